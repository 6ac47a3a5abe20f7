"""Latency and memory per mode: from a clip's decoded frames to the first token of a generated answer and to its end, batch 1.

The modes take turns, question by question, so what else the machine does meets all alike. Every timing counts: a quantile of
the fastest ones would not be one that a user meets.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fvlm_core.eval.estimates import Metric
from fvlm_core.eval.part import Context, Count, NotMeasuredError, Part, PartResult, require
from fvlm_core.markdown import escape
from fvlm_core.settings import Settings
from fvlm_core.tables import Table, number

if TYPE_CHECKING:  # they need torch
    from fvlm_core.eval.answerers.answerer import Answerer, Condition
    from fvlm_core.eval.benchmarks.benchmark import Loaded
    from fvlm_core.eval.media import Media

ROUNDS = 3
"""Times each question is timed in each mode."""
ANSWER_TOKENS = 24
"""Longest answer that is timed; it ends sooner where the model ends its turn."""
NO_ANSWER = "no question has media that can be decoded"


class Times(Settings):
    """Wall-clock times of one kind."""

    median_ms: float
    p95_ms: float
    """95th percentile; of few timings it is close to the slowest."""


class ModeLatency(Settings):
    """One mode."""

    first_token: Times
    """From the decoded frames to the first token of the answer: packing, encoding, reading, one token."""
    answer: Times
    """The same to the end of the answer."""
    peak_memory_gb: float | None = None
    """Most memory while the longest clip's question is answered: allocated on the GPU, or resident in the process; weights included."""


class LatencyResult(PartResult):
    """The modes side by side on the same questions, in turns."""

    title = "Latency"
    timing = True

    device: str
    threads: int
    batch: int = 1
    """Questions at a time."""
    clips: int
    frames: int
    """Shown frames of the longest clip timed."""
    timings: int
    """Of each kind in each mode."""
    answer_tokens: int = ANSWER_TOKENS
    """Most tokens of an answer."""
    modes: dict[str, ModeLatency]

    def count(self) -> int:
        """Clips."""
        return self.clips

    def headline(self) -> list[Metric]:
        """The medians."""
        return [
            Metric(name="first token (ms)", values={mode: one.first_token.median_ms for mode, one in self.modes.items()}, decimals=1),
            Metric(name="answer (ms)", values={mode: one.answer.median_ms for mode, one in self.modes.items()}, decimals=1),
        ]

    def tables(self) -> list[Table]:
        """Medians, 95th percentiles and memory."""
        rows = [
            [
                mode,
                *(f"{value:.1f}" for times in (one.first_token, one.answer) for value in (times.median_ms, times.p95_ms)),
                number(one.peak_memory_gb),
            ]
            for mode, one in self.modes.items()
        ]
        note = "Milliseconds from a clip's decoded frames (decoding a file is not in it) to the first token of the answer, and to its end "
        note += f"(greedy, at most {self.answer_tokens} tokens); question first, batch {self.batch}. {self.timings} timings of each kind "
        note += f"in each mode, about {self.clips} clips of up to {self.frames} frames; {escape(self.device)}, {self.threads} CPU threads. "
        note += "Peak memory: of the longest clip, "
        note += "the process's resident memory, Python and libraries included." if self.device == "cpu" else "allocated on the GPU."
        head = ["mode", "first token, median", "first token, p95", "answer, median", "answer, p95", "peak GB"]
        return [Table(title=self.title, head=head, rows=rows, note=note)]


class Latency(Part):
    """Time to the first token and to the end of an answer, and memory."""

    result = LatencyResult

    clips: Count = 8
    """Clips timed in every mode; 0 leaves latency out."""

    def measure(self, context: Context) -> LatencyResult:
        """Time every mode on the same clips, side by side."""
        from fvlm_core.eval.media import Media

        clips = context.split.clips(self.clips)
        require(len(clips), self.clips, "videos")
        asked = [Timed(clip.clip, Media(clip.sample.frames, clip.sample.media), clip.question) for clip in clips]
        return latency_of(context.answerer, context.modes, asked)

    def of_items(self, answerer: "Answerer", modes: Sequence[str] | None, loaded: "Iterable[Loaded]") -> LatencyResult:
        """The same of benchmarks' questions, about as many clips of each. Raises NotMeasuredError where there are none."""
        require(self.clips, self.clips, "questions")
        return latency_of(answerer, modes, _of_benchmarks(answerer, list(loaded), self.clips))


@dataclass(frozen=True)
class Timed:
    """A question to time."""

    name: str
    media: "Media"
    question: str


def latency_of(answerer: "Answerer", modes: Sequence[str] | None, asked: Sequence[Timed]) -> LatencyResult:
    """Time an answer to each question in `modes` (None: all of the model's), `ROUNDS` times. Raises NotMeasuredError for no question."""
    import torch

    from fvlm_core.train.metrics import peak_memory_gb, reset_peak_memory

    if not asked:
        raise NotMeasuredError(NO_ANSWER)
    conditions = answerer.conditions(["question_first"], modes, controls=False)
    longest = max(asked, key=lambda one: one.media.n_shown)
    first: dict[str, list[float]] = {one.mode: [] for one in conditions}
    complete: dict[str, list[float]] = {one.mode: [] for one in conditions}
    for condition in conditions:
        _seconds(answerer, asked[0], condition, ANSWER_TOKENS)  # the first call pays for what is set up once
    for _ in range(ROUNDS):
        for one in asked:
            for condition in conditions:
                first[condition.mode].append(_seconds(answerer, one, condition, 1))
                complete[condition.mode].append(_seconds(answerer, one, condition, ANSWER_TOKENS))
    peaks = {}
    for condition in conditions:
        reset_peak_memory(answerer.device)
        _seconds(answerer, longest, condition, ANSWER_TOKENS)
        peaks[condition.mode] = round(peak_memory_gb(answerer.device), 4)
    return LatencyResult(
        device=torch.cuda.get_device_name(answerer.device) if answerer.device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        clips=len(asked),
        frames=longest.media.n_shown,
        timings=ROUNDS * len(asked),
        modes={
            mode: ModeLatency(first_token=_times(first[mode]), answer=_times(complete[mode]), peak_memory_gb=peak)
            for mode, peak in peaks.items()
        },
    )


def _of_benchmarks(answerer: "Answerer", loaded: "Sequence[Loaded]", clips: int) -> list[Timed]:
    """Questions about different clips, evenly over the benchmarks; what cannot be decoded is passed over, the benchmark counts it."""
    from fvlm_core.data.frames import ClipError
    from fvlm_core.eval.media import NO_MEDIA

    chosen: list[Timed] = []
    for number_of, one in enumerate(loaded):
        wanted = (clips - len(chosen)) // (len(loaded) - number_of)
        items = {item.media.key: item for item in one.items if item.media is not NO_MEDIA}
        found = 0
        for key, item in items.items():
            if found == wanted:
                break
            try:
                media = item.media.load(answerer.rule, answerer.image_repeats)
            except ClipError:
                continue
            prompt = one.benchmark.prompt
            chosen.append(Timed(key, media, prompt.with_letters(item) if item.choices else prompt.open(item)))
            found += 1
    return chosen


def _seconds(answerer: "Answerer", timed: Timed, condition: "Condition", tokens: int) -> float:
    """One answer of at most so many tokens; it ends with the last one on the CPU, so the device has finished."""
    from fvlm_core.eval.answerers.answerer import Ask

    started = time.perf_counter()
    answerer.open(timed.media, timed.name).replies([Ask(timed.question, max_new_tokens=tokens)], condition)
    return time.perf_counter() - started


def _times(seconds: Sequence[float]) -> Times:
    median, p95 = (round(float(value) * 1000, 3) for value in np.quantile(seconds, [0.5, 0.95]))
    return Times(median_ms=median, p95_ms=p95)
