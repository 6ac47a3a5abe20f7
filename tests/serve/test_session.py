"""Loading every form of a model, and conversations: the same answers as the evaluation's generation, in pieces."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fvlm_core.data.batch import Sample, Turn, pack
from fvlm_core.errors import UserError
from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
from fvlm_core.eval.jobs import Original
from fvlm_core.eval.media import Media
from fvlm_core.model.inference import gaze as reference_gaze
from fvlm_core.model.inference import generate, read_batch
from fvlm_core.model.names import MODES
from fvlm_core.serve.batched_decoding import Answer, DecodingBatch, Sampling, TextPieces, read
from fvlm_core.serve.load import checked_mode, load
from fvlm_core.serve.session import Session, gaze, open_media

SHORT = Sampling(max_new_tokens=8)


@pytest.fixture
def media(root, answerer) -> Media:
    return open_media(root / "clip.mp4", answerer)


def reference(answerer: FoveatedAnswerer, media: Media, turns: list[Turn], mode, *, question_first: bool, most: int = 8) -> list[int]:
    """The evaluation's own generation over the complete conversation."""
    sample = Sample("", "", media.frames, media.shown, turns, question_first)
    subject = answerer.subject
    batch = pack([sample], subject.chat)
    return generate(subject.model, batch, mode, max_new_tokens=most, stop_ids=subject.chat.assistant_close[:1])[0]


def test_every_form_of_a_model_answers_alike(root, media):
    original = Original(vision=str(root / "dinov2"), llm=str(root / "smollm2"), frame_px=42)
    answers = []
    for name in ("run", "run/model", "released", "original.safetensors"):
        loaded = load(root / name, "cpu", original=original if name.startswith("original") else None)
        assert loaded.rule.frame_px == 42
        answers.append("".join(Session(loaded, media).ask("Which digits?", sampling=SHORT)))
    assert len(set(answers[:3])) == 1
    assert answers[0]
    torch.testing.assert_close(loaded.subject.model.llm.lm_head.weight, load(root / "run", "cpu").subject.model.llm.lm_head.weight)


@pytest.mark.parametrize("mode", MODES)
def test_a_conversation_equals_reading_it_at_once(answerer, media, mode):
    session = Session(answerer, media)
    for question in ("Which digits are there?", "And in the second row?", "Why?"):
        said = "".join(session.ask(question, mode=mode, sampling=SHORT))
        *before, last = session.turns
        turns = [*before, Turn(last.question_ids, [])]
        assert last.answer_ids == reference(answerer, media, turns, mode, question_first=False)
        assert said == answerer.subject.decode(last.answer_ids)
    assert len(session.turns) == 3


def test_a_question_before_the_video_begins_anew_and_is_seen_by_the_gaze(answerer, media):
    session = Session(answerer, media)
    list(session.ask("Which digits are there?", sampling=SHORT))
    list(session.ask("What is in the first row?", mode="autoregressive", question_first=True, sampling=SHORT))
    (turn,) = session.turns
    assert turn.answer_ids == reference(answerer, media, [Turn(turn.question_ids, [])], "autoregressive", question_first=True)
    one, other = (gaze(session, question, question_first=True) for question in ("What is in the first row?", "Is it red?"))
    assert abs(one.fine - other.fine).max() > 1e-6
    assert (one.coarse == other.coarse).all()


def test_gaze_is_the_evaluations(answerer, media):
    session = Session(answerer, media)
    found = gaze(session, "Which digits?", question_first=True)
    ids = answerer.subject.encode("Which digits?")
    batch = pack([Sample("", "", media.frames, media.shown, [Turn(ids, [])], True)], answerer.subject.chat)
    expected = reference_gaze(answerer.subject.model, batch, "coarse_fine")[:, 0]
    torch.testing.assert_close(torch.from_numpy(found.fine), expected)
    weights = read_batch(answerer.subject.model, batch, "coarse_fine", weights=True).weights
    assert weights is not None
    np.testing.assert_allclose(found.entropy, -(weights * weights.log()).sum(-1).mean((1, 2)), rtol=1e-5)
    assert len(found.frames) == len(found.entropy) == 5


def test_answers_that_join_others_are_as_if_alone(answerer, media):
    """Different questions, lengths and starts: continuous batching changes nothing."""
    subject = answerer.subject
    samples = [
        Sample("", "", media.frames[: 1 + n], [list(range(1 + n))], [Turn(subject.encode(f"Question {n}" * (n + 1)), [])], bool(n % 2))
        for n in range(4)
    ]
    limits = (3, 12, 6, 9)
    running, answers = DecodingBatch(subject), []
    for n, sample in enumerate(samples):
        found = read(subject, [sample], "coarse_fine")
        answers.append(Answer(Sampling(max_new_tokens=limits[n]), subject.chat.assistant_close[:1]))
        running.add([answers[-1]], found.cache, found.hidden)
        running.step()
    while running.rows:
        running.step()
    for n, sample in enumerate(samples):
        batch = pack([sample], subject.chat)
        alone = generate(subject.model, batch, "coarse_fine", max_new_tokens=limits[n], stop_ids=subject.chat.assistant_close[:1])[0]
        assert answers[n].tokens == alone
        assert answers[n].finished == ("length" if len(alone) == limits[n] else "stop")


def test_sampling_depends_on_its_seed_alone(answerer, media):
    hot = Sampling(max_new_tokens=12, temperature=2.0, top_p=0.95, seed=5)
    texts = ["".join(Session(answerer, media).ask("Which?", sampling=replace(hot, seed=seed))) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_characters_of_several_tokens_appear_when_complete(answerer):
    subject = answerer.subject
    ids = subject.encode("Zażółć 🙂 gęślą")
    pieces = TextPieces(subject)
    parts = [pieces.piece(ids[: n + 1]) for n in range(len(ids))] + [pieces.piece(ids, last=True)]
    assert "".join(parts) == "Zażółć 🙂 gęślą"
    assert not any("\ufffd" in part for part in parts)


def test_what_cannot_be_shown_is_named(root, answerer, tmp_path):
    (tmp_path / "broken.mp4").write_bytes((root / "clip.mp4").read_bytes()[:900])
    (tmp_path / "text.mp4").write_text("not a video")
    for path in (tmp_path / "missing.mp4", tmp_path / "broken.mp4", tmp_path / "text.mp4", tmp_path):
        with pytest.raises(UserError) as caught:
            open_media(path, answerer)
        assert caught.value.where == str(path)


def test_what_is_no_model_is_named(root, tmp_path, pooled):
    (tmp_path / "config.json").write_text("{broken")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in (root / "released").iterdir():
        content = file.read_bytes()
        (damaged / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    for path in (tmp_path, tmp_path / "nothing", damaged, root / "clip.mp4"):
        with pytest.raises(UserError) as caught:
            load(path, "cpu")
        assert caught.value.where
    still = load(pooled, "cpu")
    with pytest.raises(UserError, match="does not look anywhere"):
        gaze(Session(still, open_media(root / "clip.mp4", still)), "Which?")
    with pytest.raises(UserError, match="no mode 'fine'"):
        checked_mode(still, "fine")


def test_a_conversation_that_outgrows_the_context_is_refused(answerer, media):
    with pytest.raises(UserError, match="the model's context has"):
        list(Session(answerer, media).ask("Why? " * 10_000))
