"""Scorers against brute force with the real tiny model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fvlm_core.data.batch import IGNORE, Sample, Turn, pack
from fvlm_core.data.frames import FrameRule
from fvlm_core.eval.answerers.answerer import Ask, Condition
from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
from fvlm_core.eval.caption_metrics import caption_stats
from fvlm_core.eval.estimates import Estimate, PairedTest
from fvlm_core.eval.items import Item
from fvlm_core.eval.media import NO_MEDIA, Media
from fvlm_core.eval.part import Context
from fvlm_core.eval.parts.captions import Captions
from fvlm_core.eval.parts.multiple_choice import measure_choices
from fvlm_core.eval.parts.question_order import gaze_hits, order_results
from fvlm_core.eval.questions import without_answer
from fvlm_core.eval.stats import Bootstrap
from fvlm_core.eval.subject import Subject
from fvlm_core.eval.tables import paired_table
from fvlm_core.eval.validation import ValidationSplit
from fvlm_core.model.inference import generate, logits
from fvlm_core.model.names import MODES, Mode
from tests.eval.conftest import IMAGE_REPEATS


def direct_losses(subject: Subject, sample: Sample, mode: Mode) -> list[float]:
    """Cross-entropy of each labelled token of one sample alone, from full logits."""
    batch = pack([sample], subject.chat)
    kept = batch.labels != IGNORE
    return F.cross_entropy(logits(subject.model, batch, mode)[kept].float(), batch.labels[kept], reduction="none").tolist()


def texts(subject: Subject, item: Item) -> list[Sample]:
    """A sample per option, with the option as its answer."""
    media = item.media.load(FrameRule(42), IMAGE_REPEATS)
    question = subject.encode(item.question)
    turns = [Turn(question, subject.encode(choice)) for choice in item.choices]
    return [Sample(item.id, "", media.frames, media.shown, [turn], question_first=True) for turn in turns]


@pytest.mark.parametrize("mode", MODES)
def test_options_score_as_when_scored_one_by_one(subject: Subject, answerer: FoveatedAnswerer, split: ValidationSplit, mode: Mode):
    """Log-likelihoods of the text's tokens and of the end after it, against one pass per option."""
    for item in split.items(4):
        opened = answerer.open(item.media.load(answerer.rule, answerer.image_repeats), item.media.key)
        (reply,) = opened.replies([Ask(item.question, tuple(item.choices))], Condition(mode))
        for row, sample in zip(reply.sums, texts(subject, item), strict=True):
            *text, end = direct_losses(subject, sample, mode)
            assert row == pytest.approx([-sum(text), len(text), -end], abs=1e-3)


class Halved(Subject):
    """A subject whose passes run in bf16, as on a GPU."""

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)


def test_options_are_scored_at_the_precision_of_the_losses(subject: Subject, answerer: FoveatedAnswerer, split: ValidationSplit):
    """On a GPU: bf16 passes, logits in fp32."""
    half = Halved(subject.model, subject.tokenizer, subject.chat, subject.device, subject.batch_samples)
    (item,) = split.items(1)
    opened = [replace(answerer, subject=one).open(item.media.load(answerer.rule, IMAGE_REPEATS), "x") for one in (subject, half)]
    (full,), (rounded,) = (one.replies([Ask(item.question, tuple(item.choices))], Condition("coarse_fine")) for one in opened)
    losses = half.sample_losses(texts(subject, item), ["coarse_fine"])["coarse_fine"][:, 0]
    assert abs(rounded.sums - full.sums).max() > 1e-4, "they are rounded"
    assert -(rounded.sums[:, 0] + rounded.sums[:, 2]) == pytest.approx(losses, abs=0.05)


def test_an_options_tokens_are_those_of_the_shards(subject: Subject, split: ValidationSplit):
    for item in split.items(8):
        row = next(row for row in split.rows if f"{row.key}/{row.conversation}" == item.id)
        assert texts(subject, item)[item.gold or 0].turns == split.shards.read(row.number, image_repeats=1).turns


def test_loss_is_weighted_by_tokens(subject: Subject, split: ValidationSplit):
    """The estimate of a mode's loss is the mean over all tokens, not the mean of samples' means."""
    questions = split.captions(4) + split.places(4)
    samples = [question.sample for question in questions]
    sums = subject.sample_losses(samples, ["coarse_fine"])["coarse_fine"]
    every = [direct_losses(subject, sample, "coarse_fine") for sample in samples]
    estimate = Bootstrap(50, 0).weighted_mean(sums, [question.clip for question in questions])
    assert sums[:, 1].tolist() == [len(losses) for losses in every]
    assert estimate.value == pytest.approx(np.mean(np.concatenate(every)), abs=1e-4)
    assert estimate.value != pytest.approx(np.mean([np.mean(losses) for losses in every]), abs=1e-4)


def test_modes_are_measured_on_the_same_tokens_and_text_is_equal_in_all(subject: Subject, split: ValidationSplit):
    seen: dict[Mode, list[np.ndarray]] = {mode: [] for mode in MODES}
    sources: list[str] = []
    for batch in split.loss_batches(24, tokens_per_frame=1, batch_samples=7):
        sources += batch.sources
        for mode, rows in subject.losses(batch, MODES).items():
            seen[mode].append(rows)
    losses = {mode: np.concatenate(rows) for mode, rows in seen.items()}
    assert {source: sources.count(source) for source in sources} == dict.fromkeys(("gaze_caption", "gaze_cell", "gaze_image", "text"), 6)
    for mode in MODES[1:]:
        assert (losses[mode][:, 1] == losses["coarse_only"][:, 1]).all()
        text = np.array(sources) == "text"
        assert losses[mode][text, 0] == pytest.approx(losses["coarse_only"][text, 0], abs=1e-3)
        assert not np.allclose(losses[mode][~text, 0], losses["coarse_only"][~text, 0], atol=1e-5)


def test_baselines_and_tests_add_up(context: Context, answerer: FoveatedAnswerer, split: ValidationSplit):
    items = split.items(16)
    result = measure_choices(context, items)
    baselines, scores, tests = result.baselines, result.modes, result.paired_tests
    assert baselines.chance == 0.25
    assert sum(baselines.gold_positions) == baselines.questions == 16
    assert baselines.majority == max(baselines.gold_positions) / 16
    asks = [Ask(item.question, tuple(item.choices)) for item in items]
    blind = [reply.sums for reply in answerer.open(NO_MEDIA, "").replies(asks, Condition("coarse_only"))]
    right = [(row[:, 0] / row[:, 1]).argmax() == item.gold for row, item in zip(blind, items, strict=True)]
    assert baselines.blind.value == pytest.approx(np.mean(right))
    for mode in MODES:
        assert sum(scores[mode].predicted_positions) == 16
        assert set(scores[mode].by_task) == {"gaze_cell/cell", "gaze_image/cell"}
    assert [(test.a, test.b) for test in tests] == [
        ("coarse_only", "coarse_fine"),
        ("coarse_only", "autoregressive"),
        ("coarse_fine", "autoregressive"),
    ]
    for test in tests:
        difference = scores[test.a].accuracy.value - scores[test.b].accuracy.value
        assert test.difference.value == pytest.approx(difference, abs=1e-6)
        assert (test.only_a or 0) - (test.only_b or 0) == round(16 * difference)


def test_shuffled_frames_are_the_same_frames_in_another_order():
    media = Media(np.zeros((4, 2, 2, 3), np.uint8), [[0, 1, 2], [3, 3, 3], [2]])
    for seed in range(20):
        shown = media.shuffled(seed, "clip").shown
        assert sorted(shown[0]) == [0, 1, 2]
        assert shown[0] != [0, 1, 2]
        assert shown[1:] == [[3, 3, 3], [2]]
    assert media.shuffled(0, "clip") is not media
    assert media.shuffled(0, "clip").shown == media.shuffled(0, "clip").shown


def test_gaze_hits_find_the_cell_on_any_patch_grid():
    for patches in (3, 6, 16):
        attention = np.full((3, patches, patches), 1.0)
        attention[0, 0, 0] = attention[1, patches - 1, 0] = attention[2, patches // 2, patches // 2] = 5
        assert gaze_hits(attention, [(0, 0), (2, 0), (1, 1)]).tolist() == [True, True, True]
        assert gaze_hits(attention, [(0, 1), (2, 2), (0, 0)]).tolist() == [False, False, False]


def test_gaze_is_that_of_each_sample_alone(subject: Subject, split: ValidationSplit):
    samples = [question.sample for question in split.clips(4)] + [question.sample for question in split.captions(2)]
    for mode in MODES:
        for together, sample in zip(subject.gaze(samples, mode), samples, strict=True):
            (alone,) = subject.gaze([sample], mode)
            assert together.shape == (sum(map(len, sample.media)), 3, 3)
            assert together.sum((1, 2)) == pytest.approx(np.ones(len(together)))
            assert together == pytest.approx(alone, abs=1e-4)


def test_only_a_question_that_comes_first_moves_the_gaze(subject: Subject, split: ValidationSplit):
    """Two questions about one clip: with the question after the frames, the gaze cannot know which is asked."""
    one, other = (question.sample for question in split.places_of_one_clip(2))
    assert one.key == other.key
    assert one.turns != other.turns
    for mode in MODES:
        after = subject.gaze([replace(sample, question_first=False) for sample in (one, other)], mode)
        assert np.allclose(after[0], after[1], atol=1e-6)
    first = subject.gaze([replace(sample, question_first=True) for sample in (one, other)], "coarse_fine")
    assert not np.allclose(first[0], first[1], atol=1e-6)


def test_order_table_counts_what_a_reader_would(subject: Subject, split: ValidationSplit):
    questions = split.places(6)
    result = order_results(subject, questions, MODES, Bootstrap(50, 0))
    cells = result.cells
    every = [character for question in questions for character in question.answer]
    assert result.constant == pytest.approx(max(np.mean([c == always for c in every]) for always in "0123456789"), abs=1e-6)
    assert [(cell.order, cell.mode) for cell in cells] == [
        (order, mode) for order in ("question_first", "question_after") for mode in MODES
    ]
    for cell in cells:
        first = cell.order == "question_first"
        right = []
        for question in questions:
            (answer,) = subject.generate([without_answer(question.sample, question_first=first)], cell.mode, max_new_tokens=8)
            right.append([answer[t : t + 1] == digit for t, digit in enumerate(question.answer)])
        assert cell.accuracy.value == pytest.approx(np.mean(right), abs=1e-6)
        assert cell.accuracy.count == 18
        assert cell.first_frame.value == pytest.approx(np.mean([row[0] for row in right]), abs=1e-6)
        assert [frame.count for frame in cell.by_frame] == [6, 6, 6]
        assert cell.later_frames is not None
        assert cell.gaze_hit_rate is not None
        losses = np.concatenate(
            [direct_losses(subject, replace(question.sample, question_first=first), cell.mode) for question in questions]
        )
        assert cell.loss.value == pytest.approx(np.mean(losses), abs=1e-4)


def test_counts_beside_a_p_value_are_explained():
    """A test of accuracies has a p-value and counts; a difference of losses has neither."""
    estimate = Estimate(value=0.1, low=0.0, high=0.2, n=50, count=50)
    both = {"a": "coarse_only", "b": "coarse_fine", "difference": estimate}
    table = paired_table(
        "", [PairedTest.model_validate(both | {"metric": "multiple_choice_accuracy", "only_a": 7, "only_b": 2, "p_value": 0.18})]
    )
    assert table.rows[0][-1] == "0.18 (7 against 2)"
    assert "only the first mode answers correctly against the number that only the second does" in table.note
    assert not paired_table("", [PairedTest.model_validate(both | {"metric": "loss"})]).note


def test_accuracy_is_one_when_the_model_says_the_answer(subject: Subject, split: ValidationSplit):
    """The questions' answers replaced by what the model generates in as many tokens as it is given."""
    questions = []
    for question in split.places(3):
        bare = without_answer(question.sample, question_first=True)
        (said,) = subject.generate([bare], "coarse_fine", max_new_tokens=8)
        turns = [Turn(bare.turns[0].question_ids, [0] * 7)]
        questions.append(replace(question, answer=said, sample=replace(question.sample, turns=turns), cells=[(0, 0)] * 3))
    assert all(question.answer for question in questions)
    first, after = order_results(subject, questions, ["coarse_fine"], Bootstrap(20, 0)).cells
    assert first.accuracy.value == 1
    assert first.exact is not None
    assert first.exact.value == 1
    assert first.later_frames is not None
    for share in (first.accuracy, first.later_frames, first.first_frame, *first.by_frame):  # all right in a few clips is no certainty
        assert (share.value, share.high, share.exact) == (1, 1, True)
        assert share.low == pytest.approx(0.025 ** (1 / share.n), abs=1e-6)
    assert after.accuracy.value < 1
    longer = [replace(question, answer=question.answer[:3], cells=[(0, 0)] * 3) for question in questions]
    said_more, _ = order_results(subject, longer, ["coarse_fine"], Bootstrap(20, 0)).cells
    assert said_more.accuracy.value == 0, "an answer that goes on after the right one is another answer"


def test_generation_leaves_out_the_end_of_the_turn(subject: Subject, split: ValidationSplit):
    sample = without_answer(split.captions(1)[0].sample, question_first=False)
    (ids,) = generate(subject.model, subject.pack([sample]), "coarse_only", max_new_tokens=6, stop_ids=[])
    stopping = replace(subject, chat=replace(subject.chat, assistant_close=ids[2:3]))
    (said,) = stopping.generate([sample], "coarse_only", max_new_tokens=6)
    assert said == str(subject.tokenizer.decode(ids[: ids.index(ids[2])])).strip()


def test_the_constant_caption_is_a_reference_and_scores_as_a_model_that_says_it(context: Context, split: ValidationSplit):
    result = Captions(samples=6, max_new_tokens=4).measure(context)
    references = [question.answer for question in split.captions(6)]
    assert result.constant_caption in references
    constants = [caption_stats([text] * 6, [[one] for one in references]).cider_d.mean() for text in references]
    assert result.constant.cider_d.value == pytest.approx(max(constants), abs=1e-6)
