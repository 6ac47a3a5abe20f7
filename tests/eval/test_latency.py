"""Time and memory of an answer: which questions are timed, what is counted, and that `fvlm eval` says it in every mode."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gaze_forms import items as gaze_items
from deployments.evaluate import evaluate
from fvlm_core.eval.answerers.answerer import Ask, Condition
from fvlm_core.eval.answerers.foveated import FoveatedAnswerer, OpenedMedia
from fvlm_core.eval.benchmarks import benchmark
from fvlm_core.eval.benchmarks.benchmark import Loaded
from fvlm_core.eval.items import Item
from fvlm_core.eval.media import NO_MEDIA, VideoFile
from fvlm_core.eval.part import NotMeasuredError
from fvlm_core.eval.parts.latency import ANSWER_TOKENS, ROUNDS, Latency
from fvlm_core.eval.results import Results
from fvlm_core.model.names import MODES
from tests.eval.published import mp4


def loaded(name: str, items: list[Item]) -> Loaded:
    return Loaded(benchmark(name), items, len(items), {}, {})


def test_answers_to_questions_of_every_benchmark_are_timed(answerer: FoveatedAnswerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two clips of each; a file that cannot be decoded and a question without media are passed over."""
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    files = [tmp_path / "bad.mp4", mp4(tmp_path / "a.mp4"), mp4(tmp_path / "b.mp4", seed=1), mp4(tmp_path / "c.mp4", seed=2)]
    own = [
        Item("text", NO_MEDIA, "Which?", ["x", "y"], 0),
        *(Item(file.name, VideoFile(file, root=tmp_path), "Which?", ["x", "y"], 0) for file in files),
    ]
    asked: list[tuple[str, str, int]] = []
    real = OpenedMedia.replies

    def replies(self: OpenedMedia, asks: list[Ask], condition: Condition):
        asked.append((self.name, condition.mode, asks[0].max_new_tokens))
        return real(self, asks, condition)

    monkeypatch.setattr(OpenedMedia, "replies", replies)
    found = Latency(clips=4).of_items(answerer, None, [loaded("own", own), loaded("gaze", gaze_items(3))])
    assert (found.clips, found.timings, found.batch, list(found.modes)) == (4, 4 * ROUNDS, 1, list(MODES))
    clips = ["a.mp4", "b.mp4", "gaze-0", "gaze-1"]
    for mode in MODES:
        for tokens, more in ((1, 0), (ANSWER_TOKENS, 2)):  # once to warm up, once for the memory
            times = [clip for clip, of, n in asked if (of, n) == (mode, tokens)]
            assert len(times) == found.timings + more
            assert set(times) == set(clips)
        one = found.modes[mode]
        assert 0 < one.first_token.median_ms <= one.first_token.p95_ms
        assert 0 < one.answer.median_ms <= one.answer.p95_ms
    assert found.frames == max(item.media.load(answerer.rule, 1).n_shown for item in (own[2], own[3], *gaze_items(1)))


def test_it_says_why_nothing_was_timed(answerer: FoveatedAnswerer):
    text = loaded("own", [Item("text", NO_MEDIA, "Which?", ["x", "y"], 0)])
    with pytest.raises(NotMeasuredError, match="no question has media that can be decoded"):
        Latency().of_items(answerer, None, [text])
    with pytest.raises(NotMeasuredError, match="switched off"):
        Latency(clips=0).of_items(answerer, None, [loaded("gaze", gaze_items(1))])


def test_fvlm_eval_times_every_mode_outside_the_results(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "out"
    options = {"checkpoint": model_folder, "benchmarks": "gaze", "output": output, "limit": 9, "device": "cpu"}
    assert evaluate(**options, latency_clips=1) == 0
    said = capsys.readouterr().out
    assert "first token (ms)" in said
    assert "answer (ms)" in said
    timings = json.loads((output / "timings.json").read_text())["latency"]
    assert list(timings["modes"]) == list(MODES)
    before = (output / "results.json").read_bytes()
    assert b"median_ms" not in before
    assert "## Latency" in (output / "tables.md").read_text()
    assert "latency" in Results.read(output).parts
    assert evaluate(**options, latency_clips=1) == 0
    assert (output / "results.json").read_bytes() == before
    assert evaluate(**options, latency_clips=0) == 0
    assert "latency" not in Results.read(output).parts, "what an earlier evaluation timed is not this one's"


def test_the_longest_clip_gives_the_memory(answerer: FoveatedAnswerer):
    short, long = gaze_items(1)[0], gaze_items(2)[-1]
    media = long.media.load(answerer.rule, 1)
    longer = replace(long, media=_Given("long", replace(media, shown=[[0, 1, 2] * 4])))
    found = Latency(clips=2).of_items(answerer, ["coarse_only"], [loaded("gaze", [short, longer])])
    assert (found.frames, list(found.modes)) == (12, ["coarse_only"])
    peak = found.modes["coarse_only"].peak_memory_gb
    assert peak is not None
    assert peak > 0.05, "the process's memory, torch included"


class _Given:
    """Media at hand."""

    def __init__(self, key: str, media):
        self.key, self.media = key, media

    def load(self, rule, image_repeats):
        return self.media
