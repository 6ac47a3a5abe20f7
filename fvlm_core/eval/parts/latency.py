"""Latency and memory of each mode: the time from a clip's decoded frames to the first token and to the end of a generated answer, batch 1.

The modes alternate, question by question, so that other load on the machine affects all of them alike. Quantiles are over all timings,
not over the fastest ones, because those are not what a user experiences.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fvlm_core.eval.answerers.answerer import Order
from fvlm_core.eval.estimates import Metric
from fvlm_core.eval.part import Context, Count, NotMeasuredError, Part, PartResult, require
from fvlm_core.markdown import escape
from fvlm_core.settings import Settings
from fvlm_core.tables import Table, number, words

if TYPE_CHECKING:  # they need torch
    from fvlm_core.eval.answerers.answerer import Answerer, Condition
    from fvlm_core.eval.benchmarks.benchmark import Loaded
    from fvlm_core.eval.media import Media

ROUNDS = 3
"""Number of timings per question and mode."""
ANSWER_TOKENS = 24
"""Maximum length of a timed answer, in tokens; shorter if the model ends its turn."""
NO_ANSWER = "no question has media that can be decoded"


class Times(Settings):
    """Statistics of wall-clock times."""

    median_ms: float
    p95_ms: float
    """95th percentile; with few timings, it is close to the maximum."""


class ModeLatency(Settings):
    """Latency and memory of one mode."""

    first_token: Times
    """Time from the decoded frames to the first token of the answer: packing, encoding, prefill, one token."""
    answer: Times
    """Time from the decoded frames to the end of the answer."""
    peak_memory_gb: float | None = None
    """Peak memory while answering about the longest clip, weights included: allocated on the GPU, or resident in the process."""


class LatencyResult(PartResult):
    """Latency of all modes on the same questions."""

    title = "Latency"
    timing = True

    device: str
    threads: int
    batch: int = 1
    """Batch size, in questions."""
    clips: int
    frames: int
    """Number of shown frames of the longest timed clip."""
    timings: int
    """Number of timings of each kind, per mode."""
    answer_tokens: int = ANSWER_TOKENS
    """Maximum number of tokens in an answer."""
    order: Order = "question_first"
    """The question order that the model is made for."""
    modes: dict[str, ModeLatency]

    def count(self) -> int:
        """Number of clips."""
        return self.clips

    def headline(self) -> list[Metric]:
        """Medians of both times."""
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
        note = "Milliseconds from a clip's decoded frames (file decoding excluded) to the first token of the answer, and to its end "
        note += (
            f"(greedy, at most {self.answer_tokens} tokens); {words(self.order)}, batch {self.batch}. {self.timings} timings of each kind "
        )
        note += f"per mode, on {self.clips} clips of up to {self.frames} frames; {escape(self.device)}, {self.threads} CPU threads. "
        note += "Peak memory: for the longest clip, "
        note += "the process's resident memory, Python and libraries included." if self.device == "cpu" else "allocated on the GPU."
        head = ["mode", "first token, median", "first token, p95", "answer, median", "answer, p95", "peak GB"]
        return [Table(title=self.title, head=head, rows=rows, note=note)]


class Latency(Part):
    """Time to the first token and to the end of an answer, and memory."""

    result = LatencyResult

    clips: Count = 8
    """Number of clips timed in every mode; 0 skips latency."""

    def measure(self, context: Context) -> LatencyResult:
        """Time every mode on the same clips."""
        from fvlm_core.eval.media import Media

        clips = context.split.clips(self.clips)
        require(len(clips), self.clips, "videos")
        asked = [Timed(clip.clip, Media(clip.sample.frames, clip.sample.media), clip.question) for clip in clips]
        return latency_of(context.answerer, context.modes, asked)

    def of_items(self, answerer: "Answerer", modes: Sequence[str] | None, loaded: "Iterable[Loaded]") -> LatencyResult:
        """Time questions of benchmarks, with clips spread evenly over the benchmarks. Raises NotMeasuredError if there are none."""
        require(self.clips, self.clips, "questions")
        return latency_of(answerer, modes, _of_benchmarks(answerer, list(loaded), self.clips))


@dataclass(frozen=True)
class Timed:
    """A question to time."""

    name: str
    media: "Media"
    question: str


def latency_of(answerer: "Answerer", modes: Sequence[str] | None, asked: Sequence[Timed]) -> LatencyResult:
    """Time the answer to each question `ROUNDS` times in each of `modes` (None: all modes). Raises NotMeasuredError for no questions."""
    import torch

    from fvlm_core.train.metrics import peak_memory_gb, reset_peak_memory

    if not asked:
        raise NotMeasuredError(NO_ANSWER)
    conditions = answerer.conditions([answerer.native_order], modes, controls=False)
    longest = max(asked, key=lambda one: one.media.n_shown)
    first: dict[str, list[float]] = {one.mode: [] for one in conditions}
    complete: dict[str, list[float]] = {one.mode: [] for one in conditions}
    for condition in conditions:
        _seconds(answerer, asked[0], condition, ANSWER_TOKENS)  # warm-up: the first call includes one-time setup
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
        order=answerer.native_order,
        clips=len(asked),
        frames=longest.media.n_shown,
        timings=ROUNDS * len(asked),
        modes={
            mode: ModeLatency(first_token=_times(first[mode]), answer=_times(complete[mode]), peak_memory_gb=peak)
            for mode, peak in peaks.items()
        },
    )


def _of_benchmarks(answerer: "Answerer", loaded: "Sequence[Loaded]", clips: int) -> list[Timed]:
    """Questions about different clips, spread evenly over the benchmarks. Undecodable media are skipped; the benchmarks count them."""
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
                media = answerer.load_media(item.media)
            except ClipError:
                continue
            prompt = one.benchmark.prompt
            chosen.append(Timed(key, media, prompt.with_letters(item) if item.choices else prompt.open(item)))
            found += 1
    return chosen


def _seconds(answerer: "Answerer", timed: Timed, condition: "Condition", tokens: int) -> float:
    """Seconds for one answer of at most `tokens` tokens. Its tokens are on the CPU at the end, so no device synchronisation is needed."""
    from fvlm_core.eval.answerers.answerer import Ask

    started = time.perf_counter()
    answerer.open(timed.media, timed.name).replies([Ask(timed.question, max_new_tokens=tokens)], condition)
    return time.perf_counter() - started


def _times(seconds: Sequence[float]) -> Times:
    median, p95 = (round(float(value) * 1000, 3) for value in np.quantile(seconds, [0.5, 0.95]))
    return Times(median_ms=median, p95_ms=p95)
