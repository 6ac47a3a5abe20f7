"""Items put to a model: conditions, controls, what is computed once, shards that survive being killed, ranks that change nothing."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gaze_forms import items as gaze_items
from fvlm_core.errors import UserError
from fvlm_core.eval.answerers.answerer import Ask, Condition
from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
from fvlm_core.eval.asking import AskSettings, ask_all, ask_shard, collect, shards_of
from fvlm_core.eval.benchmark_result import benchmark_result, chosen
from fvlm_core.eval.benchmarks import benchmark
from fvlm_core.eval.benchmarks.benchmark import Loaded, load
from fvlm_core.eval.evaluate import evaluate
from fvlm_core.eval.generation import GREEDY, Generation
from fvlm_core.eval.items import Item
from fvlm_core.eval.media import NO_MEDIA, Media, VideoFile
from fvlm_core.eval.questions import question_sample
from fvlm_core.eval.ranks import Ranks
from fvlm_core.eval.records import ConditionOutput, ItemRecord, option_scores, read_shard, rounded, write_shard
from fvlm_core.eval.results import EvalReport
from fvlm_core.eval.stats import Bootstrap
from fvlm_core.model import inference
from fvlm_core.model.build import build_model
from fvlm_core.model.decoding import continue_sampling, continue_with_beams
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.names import MODES
from tests.eval.conftest import small_job
from tests.eval.published import jsonl, mp4

GAZE = benchmark("gaze")
WORDS = ["red", "digit", "left", "top", "seven", "centre", "shows", "right", "bottom", "video", "three", "white", "pink", "nine"]


def loaded(clips: int) -> Loaded:
    items = gaze_items(clips)
    return Loaded(GAZE, items, len(items), {}, {})


def media(frames: int, seed: int = 0) -> Media:
    return Media(np.random.default_rng(seed).integers(0, 256, (frames, 42, 42, 3), dtype=np.uint8), [list(range(frames))])


def test_every_mode_in_every_order_and_all_controls(answerer: FoveatedAnswerer):
    conditions = answerer.conditions(["question_first", "question_after"], None, controls=True)
    assert [one.name for one in conditions] == [
        *(f"{order}/{mode}" for order in ("question_first", "question_after") for mode in MODES),
        *(f"shuffled/{mode}" for mode in MODES),
        "blind",
        "random_query",
        "question_query",
    ]
    with pytest.raises(UserError, match="no mode coarse_fin"):
        answerer.conditions(["question_first"], ["coarse_fin"], controls=False)


def test_a_letter_costs_no_pass_and_is_the_next_token(answerer: FoveatedAnswerer):
    subject = answerer.subject
    (reply,) = answerer.open(media(3), "m").replies([Ask("Which?", ("A", "B"), first_token=True)], Condition("coarse_fine"))
    batch = subject.pack([question_sample("m", media(3), subject.encode("Which?"), question_first=True)])
    scores = inference.logits(subject.model, batch, "coarse_fine")[-1].float().log_softmax(-1)
    assert reply.sums[:, 0] == pytest.approx([float(scores[subject.encode(letter)[0]]) for letter in "AB"], abs=1e-4)


def test_an_answer_is_generated_in_the_way_asked_for(answerer: FoveatedAnswerer):
    """Beams and draws against the decoders themselves; a question's draws do not depend on what is asked beside it."""
    opened, condition = answerer.open(media(3), "m"), Condition("coarse_fine")
    subject = answerer.subject
    texts = ["Which digits are at the top left?", "Which are at the top right?"]
    for generation in (GREEDY, Generation(method="beams", beams=3), Generation(method="sample", temperature=2.0, seed=3)):
        asks = [Ask(text, max_new_tokens=6, generation=generation) for text in texts]
        together = [reply.said for reply in opened.replies(asks, condition)]
        assert together == [opened.replies([ask], condition)[0].said for ask in asks]
        beside = opened.replies([Ask(texts[1], max_new_tokens=4), asks[0]], condition)
        assert beside[1].said == together[0], "asks of another kind in the same batch"
        batch = subject.pack([question_sample("m", media(3), subject.encode(text), question_first=True) for text in texts])
        context = inference.read_batch(subject.model, batch, "coarse_fine", room=6)
        assert context.cache is not None
        hidden, stop = context.hidden[batch.cu_seqlens[1:].long() - 1], subject.chat.assistant_close[:1]
        options = {"max_new_tokens": 6, "stop_ids": stop}
        if generation.method == "beams":
            ids = continue_with_beams(subject.model, context.cache, hidden, beams=3, **options)
        elif generation.method == "sample":
            seeds = [generation.seed_of("m", subject.encode(text)) for text in texts]
            assert len(set(seeds)) == 2
            ids = continue_sampling(subject.model, context.cache, hidden, temperature=2.0, seeds=seeds, **options)
        else:
            ids = inference.continue_greedily(subject.model, context.cache, hidden, **options)
        assert together == [subject.decode(answer) for answer in ids]
    other = Generation(method="sample", temperature=2.0, seed=4)
    assert opened.replies([Ask(texts[0], max_new_tokens=6, generation=other)], condition)[0].said != together[0]


def test_controls_are_what_they_say(answerer: FoveatedAnswerer):
    """Blind: as without media. Shuffled: as with the shuffled frames. Random and question queries: reading with those queries."""
    asks = [Ask("Which digits are at the top left?", ("123", "45"))]
    shown = media(3)
    opened = answerer.open(shown, "m")

    def sums(condition: Condition, of: Media = shown) -> np.ndarray:
        return (opened if of is shown else answerer.open(of, "m")).replies(asks, condition)[0].sums

    assert sums(Condition("coarse_only", view="blind")) == pytest.approx(sums(Condition("coarse_only"), NO_MEDIA), abs=1e-4)
    shuffled = sums(Condition("autoregressive", view="shuffled"))
    assert shuffled == pytest.approx(sums(Condition("autoregressive"), shown.shuffled(answerer.seed, "m")), abs=1e-4)
    plain = sums(Condition("coarse_fine"))
    for view in ("random_query", "question_query"):
        assert not np.allclose(sums(Condition("coarse_fine", view=view)), plain, atol=1e-5)


def test_the_questions_query_is_the_first_frames(answerer: FoveatedAnswerer):
    """With one frame there is nothing before it but the question, so one query of the question is what coarse->fine looks with."""
    asks = [Ask("Which digits are at the top left?", ("1", "45")), Ask("Which?", ("2",))]
    opened = answerer.open(media(1), "m")
    fine, query = (opened.replies(asks, Condition("coarse_fine", view=view)) for view in ("shown", "question_query"))
    for one, other in zip(fine, query, strict=True):
        assert one.sums == pytest.approx(other.sums, abs=1e-3)


def test_generated_answers_are_those_of_each_question_alone(answerer: FoveatedAnswerer):
    asks = [Ask("Which digits?", max_new_tokens=5), Ask("Where?", ("x",)), Ask("What is the colour?", max_new_tokens=8)]
    opened = answerer.open(media(3), "m")
    together = [reply.said for reply in opened.replies(asks, Condition("coarse_fine"))]
    alone = [opened.replies([ask], Condition("coarse_fine"))[0].said for ask in asks]
    assert together == alone
    assert together[1] == ""
    assert together[0]


def test_a_video_is_encoded_once_and_a_question_read_once_for_all_options(answerer: FoveatedAnswerer, monkeypatch: pytest.MonkeyPatch):
    """`benchmarks.evaluation` has the FLOPs at real size."""
    frames: list[int] = []
    tokens: list[int] = []
    encode, run_llm = FoveatedVLM.encode, FoveatedVLM.run_llm
    monkeypatch.setattr(FoveatedVLM, "encode", lambda self, pixels: frames.append(len(pixels)) or encode(self, pixels))
    monkeypatch.setattr(FoveatedVLM, "run_llm", lambda self, states, *more: tokens.append(len(states)) or run_llm(self, states, *more))
    options = ("one two", "three", "four five six", "seven")
    read: dict[int, int] = {}
    for count in (0, 1, 4):
        opened = answerer.open(media(16), "m")
        frames.clear()
        tokens.clear()
        for condition in answerer.conditions(["question_first"], None, controls=False):
            opened.replies([Ask("Which digits?", options[:count], max_new_tokens=0)], condition)
        assert sum(frames) == 16, "in three modes"
        read[count] = sum(tokens)
    lengths = [len(answerer.subject.encode(option)) for option in options]
    assert read[1] - read[0] == 3 * lengths[0]
    assert read[4] - read[0] == 3 * sum(lengths)


def test_a_random_model_has_no_liking_for_lengths(answerer: FoveatedAnswerer):
    """Options of 1, 2, 4 and 8 random words: mean and pmi choose each about equally often, the sum takes the shortest."""
    rng = np.random.default_rng(0)
    picks: dict[str, list[int]] = {"sum": [], "mean": [], "pmi": []}
    for seed in range(4):
        model = build_model(answerer.subject.model.settings, vocab_size=answerer.subject.model.llm.config.vocab_size, seed=seed).eval()
        random = replace(answerer, subject=replace(answerer.subject, model=model))
        asks, orders = [], []
        for _ in range(60):
            order = rng.permutation(4)
            options = [" ".join(rng.choice(WORDS, 2**length)) for length in order]
            asks.append(Ask(f"Which {rng.choice(WORDS)} {rng.choice(WORDS)}?", tuple(options)))
            orders.append(order)
        replies = random.open(media(2, seed), "m").replies(asks, Condition("coarse_only"))
        priors = random.unconditional([text for ask in asks for text in ask.continuations])
        for number, (reply, order) in enumerate(zip(replies, orders, strict=True)):
            prior = [row[0] + row[2] for one in priors[4 * number : 4 * number + 4] for row in rounded(one)]
            record = ItemRecord(id="", clip="", groups={}, said={"c": ConditionOutput(options=rounded(reply))}, unconditional=prior)
            for scorer, chosen_lengths in picks.items():
                scores = option_scores(record, "c", scorer)
                assert scores is not None
                chosen_lengths.append(int(order[scores.argmax()]))
    shares = {scorer: np.bincount(lengths, minlength=4) / 240 for scorer, lengths in picks.items()}
    assert shares["sum"][0] > 0.7
    for scorer in ("mean", "pmi"):
        assert (abs(shares[scorer] - 0.25) < 0.09).all(), f"{scorer}: {shares[scorer]}; three standard errors are 0.084"


def test_items_about_the_same_media_stand_together_and_are_opened_once(answerer: FoveatedAnswerer, monkeypatch: pytest.MonkeyPatch):
    items = gaze_items(3)
    mixed = [items[place] for place in np.random.default_rng(0).permutation(len(items))]
    (shard,) = shards_of(mixed)
    opened: list[str] = []
    real = FoveatedAnswerer.open
    monkeypatch.setattr(FoveatedAnswerer, "open", lambda self, shown, name: opened.append(name) or real(self, shown, name))
    conditions = answerer.conditions(["question_first"], ["coarse_only"], controls=False)
    records = ask_shard(answerer, GAZE, AskSettings(options_text=False), conditions, shard.items)
    assert [record.id for record in records] == [item.id for item in shard.items]
    assert sorted(opened) == ["gaze-0", "gaze-1", "gaze-2"]


def test_shards_are_the_same_for_any_number_of_ranks_and_finished_ones_are_kept(
    answerer: FoveatedAnswerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = AskSettings(orders=["question_first"], modes=["coarse_fine"], controls=False, letters=False)
    items = loaded(9)
    one, four = tmp_path / "one", tmp_path / "four"
    ask_all(answerer, items, settings, one)
    for rank in range(4):
        ask_all(answerer, items, settings, four, ranks=Ranks(rank, 4))
    names = sorted(path.name for path in one.iterdir())
    assert len(names) == 3
    assert [(one / name).read_bytes() for name in names] == [(four / name).read_bytes() for name in names]
    (four / names[0]).unlink()
    (four / names[2]).write_text("half a li")
    with pytest.raises(UserError, match="a shard of the evaluation is not finished"):
        collect(answerer, items, settings, four, max_missing_share=0)
    asked: list[int] = []
    real = FoveatedAnswerer.open
    monkeypatch.setattr(FoveatedAnswerer, "open", lambda self, shown, name: asked.append(1) or real(self, shown, name))
    ask_all(answerer, items, settings, four)
    assert len(asked) == 2 * (3 + 3), "of two shards the media, and what is asked without them"
    assert [(one / name).read_bytes() for name in names] == [(four / name).read_bytes() for name in names]
    ask_all(replace(answerer, checkpoint="other"), items, settings, four)
    assert (one / names[0]).read_bytes() != (four / names[0]).read_bytes(), "another model's records are not taken"


def test_a_video_that_cannot_be_decoded_is_counted_and_too_many_are_an_error(answerer: FoveatedAnswerer, tmp_path: Path):
    (tmp_path / "bad.mp4").write_bytes(b"\0" * 1000)
    good = VideoFile(mp4(tmp_path / "good.mp4"))
    items = [Item(f"{n}", VideoFile(tmp_path / "bad.mp4") if n == 3 else good, "Which?", ["a", "b"], 0) for n in range(8)]
    few = Loaded(benchmark("own"), items, len(items), {}, {})
    settings = AskSettings(orders=["question_first"], modes=["coarse_only"], controls=False)
    with pytest.raises(UserError, match=r"1 of 8 items of own could not be decoded; the limit is 1%:\n    3: not a readable video"):
        ask_all(answerer, few, settings, tmp_path / "strict")
    ask_all(answerer, few, settings, tmp_path / "lax", max_missing_share=0.2)
    records = collect(answerer, few, settings, tmp_path / "lax", max_missing_share=0.2)
    result = benchmark_result(few, records, Bootstrap(20, 0), fps=1, frame_px=42)
    assert (result.questions, result.rows) == (7, 8)
    assert list(result.undecodable) == ["3"]


def test_replaced_media_and_corrected_answers_count_at_the_next_evaluation(answerer: FoveatedAnswerer, tmp_path: Path):
    video = tmp_path / "video.mp4"
    video.write_bytes(b"\0" * 1000)
    settings = AskSettings(orders=["question_first"], modes=["coarse_only"], controls=False)

    def asked(gold: int) -> ItemRecord:
        items = Loaded(benchmark("own"), [Item("one", VideoFile(video), "Which?", ["a", "b"], gold)], 1, {}, {})
        ask_all(answerer, items, settings, tmp_path / "items", max_missing_share=1)
        return collect(answerer, items, settings, tmp_path / "items", max_missing_share=1)[0]

    assert asked(0).error
    mp4(video)
    good = asked(0)
    assert not good.error
    corrected = asked(1)
    assert (good.gold, corrected.gold) == (0, 1)
    assert corrected.said == good.said


def test_a_shard_holds_any_character_and_counts_as_unfinished_where_it_cannot_be_read(tmp_path: Path):
    file, text = tmp_path / "0.jsonl", "a\u2028b\u2029c\u0085d\x1ee\r\nf"
    records = [ItemRecord(id=text, clip="c", groups={}, choices=[text, "x"], said={"blind": ConditionOutput(text=text)})] * 2
    write_shard(file, "key", records)
    assert read_shard(file, "key") == records
    file.write_text(file.read_text()[:-9])
    assert read_shard(file, "key") is None


def test_videos_of_one_name_in_two_folders_are_each_asked_about(answerer: FoveatedAnswerer, tmp_path: Path):
    rows = []
    for seconds, folder in ((2, "cam1"), (3, "cam2")):
        mp4(tmp_path / folder / "clip.mp4", seconds)
        rows += [{"video": f"{folder}/clip.mp4", "question": question, "answer": "1"} for question in ("How many?", "How often?")]
    jsonl(tmp_path / "mine.jsonl", rows)
    own = load(benchmark("own"), tmp_path)
    assert [item.media.key for item in own.items] == ["cam1/clip.mp4"] * 2 + ["cam2/clip.mp4"] * 2, "equal on every machine"
    settings = AskSettings(orders=["question_first"], modes=["coarse_only"], controls=False)
    ask_all(answerer, own, settings, tmp_path / "shards")
    records = collect(answerer, own, settings, tmp_path / "shards", max_missing_share=0)
    assert [record.frames for record in records] == [2, 2, 3, 3]


def test_choices_of_records_are_those_of_the_model(answerer: FoveatedAnswerer):
    items = gaze_items(1)
    conditions = answerer.conditions(["question_after"], ["autoregressive"], controls=False)
    for item, record in zip(items, ask_shard(answerer, GAZE, AskSettings(), conditions, items), strict=True):
        opened = answerer.open(item.media.load(answerer.rule, 8), "x")
        (reply,) = opened.replies([Ask(item.question, tuple(item.choices))], Condition("autoregressive", "question_after"))
        best = int((reply.sums[:, 0] / reply.sums[:, 1]).argmax())
        assert chosen(record, "question_after/autoregressive", "mean") == best, "options of equal length"
        assert len(record.said["question_after/autoregressive"].letters) == 4


@pytest.mark.slow(reason="starts three programs")
def test_a_killed_evaluation_of_two_ranks_goes_on_alone_and_gives_the_same_numbers(run: Path, shards: Path, tmp_path: Path):
    off = {"captions": {"samples": 0}, "multiple_choice": {"questions": 0}, "question_order": {"questions": 0}, "latency": {"clips": 0}}
    off |= {"losses": {"samples": 4}, "gaze": {"heatmaps": 0, "entropy_clips": 1}}
    ask = {"controls": False, "letters": False, "orders": ["question_first"]}
    gaze = {"run": ["gaze"], "limit": 216, "ask": ask}
    complete = evaluate(small_job(run, shards, tmp_path / "complete", benchmarks=gaze, **off))
    output = tmp_path / "killed"
    small_job(run, shards, output, benchmarks=gaze, **off).to_yaml(tmp_path / "job.yaml")
    torchrun = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "fvlm_core.eval"]
    killed = subprocess.Popen([*torchrun, tmp_path / "job.yaml"], start_new_session=True, stderr=subprocess.DEVNULL)
    items = output / "items" / "gaze"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(items.glob("*.jsonl"))) < 2:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    left = {path.name: path.stat().st_mtime_ns for path in items.glob("*.jsonl")}
    assert not (output / "manifest.json").exists()
    assert 2 <= len(left) < 8, "it was killed in between"
    subprocess.run([sys.executable, "-m", "fvlm_core.eval", tmp_path / "job.yaml"], check=True)
    assert {path.name: path.stat().st_mtime_ns for path in items.glob("*.jsonl") if path.name in left} == left
    assert complete is not None
    assert EvalReport.read(output).digest == complete.digest
    assert (output / "results.json").read_bytes() == (tmp_path / "complete" / "results.json").read_bytes()
