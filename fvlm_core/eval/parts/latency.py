"""Latency and memory per mode: from a clip's frames to the first token of the answer, one clip at a time, the modes taking turns."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fvlm_core.eval.estimates import Metric
from fvlm_core.eval.part import Context, Count, Part, PartResult, require
from fvlm_core.markdown import escape
from fvlm_core.model.names import Mode
from fvlm_core.settings import Settings
from fvlm_core.tables import Table, number

if TYPE_CHECKING:  # they need torch
    from fvlm_core.data.batch import Sample
    from fvlm_core.eval.subject import Subject

ROUNDS = 3
"""Times each clip is timed in each mode; its fastest counts, which leaves out what else the machine was doing."""


class ModeLatency(Settings):
    """Wall-clock time from a clip's frames to the first token of the answer, one clip at a time."""

    median_ms: float
    low_ms: float
    """Lower quartile."""
    high_ms: float
    """Upper quartile."""
    clips: int
    peak_memory_gb: float | None = None
    """Most memory while the longest clip is read: allocated on the GPU, or resident in the process; the model's weights are in it."""


class LatencyResult(PartResult):
    """The modes side by side on the same clips, in turns."""

    title = "Latency"
    timing = True

    device: str
    threads: int
    frames: int
    """Frames of the longest clip timed."""
    modes: dict[Mode, ModeLatency]

    def count(self) -> int:
        """Clips."""
        return next(iter(self.modes.values())).clips

    def headline(self) -> list[Metric]:
        """The median."""
        return [Metric(name="first token (ms)", values={mode: one.median_ms for mode, one in self.modes.items()}, decimals=1)]

    def tables(self) -> list[Table]:
        """Median and quartiles, and memory."""
        rows = [
            [mode, *(f"{value:.1f}" for value in (one.median_ms, one.low_ms, one.high_ms)), number(one.peak_memory_gb)]
            for mode, one in self.modes.items()
        ]
        note = "Milliseconds from a clip's frames to the first token of the answer, one clip at a time: "
        note += f"{self.count()} clips of up to {self.frames} frames on {escape(self.device)}, {self.threads} CPU thread(s)."
        note += " Peak memory: of the longest of them, "
        note += "the process's resident memory, Python and libraries included." if self.device == "cpu" else "allocated on the GPU."
        return [Table(title=self.title, head=["mode", "median", "lower quartile", "upper quartile", "peak GB"], rows=rows, note=note)]


class Latency(Part):
    """Time to the first token."""

    result = LatencyResult

    clips: Count = 8
    """Clips timed in every mode; 0 leaves latency out."""

    def measure(self, context: Context) -> LatencyResult:
        """Time every mode on the same clips, side by side."""
        import torch

        from fvlm_core.eval.questions import without_answer

        subject, modes = context.subject, context.modes
        clips = context.split.clips(self.clips)
        require(len(clips), self.clips, "videos")
        samples = [without_answer(clip.sample, question_first=clip.sample.question_first) for clip in clips]
        for mode in modes:
            _seconds(subject, samples[0], mode)  # the first call pays for what is set up once
        rounds = _rounds(subject, samples, modes)
        longest = max(samples, key=lambda sample: sum(map(len, sample.media)))
        peaks = {mode: _peak_gb(subject, longest, mode) for mode in modes}
        return LatencyResult(
            device=torch.cuda.get_device_name() if subject.device.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            frames=max(sum(map(len, sample.media)) for sample in samples),
            modes={mode: _summary([min(times) for times in zip(*rounds[mode], strict=True)], peaks[mode]) for mode in modes},
        )


def _rounds(subject: "Subject", samples: "Sequence[Sample]", modes: Sequence[Mode]) -> dict[Mode, list[list[float]]]:
    """Per mode and round, the seconds of each sample."""
    rounds: dict[Mode, list[list[float]]] = {mode: [[] for _ in range(ROUNDS)] for mode in modes}
    for round_number in range(ROUNDS):
        for sample in samples:
            for mode in modes:
                rounds[mode][round_number].append(_seconds(subject, sample, mode))
    return rounds


def _seconds(subject: "Subject", sample: "Sample", mode: Mode) -> float:
    """Packing, encoding, reading and the first token; `generate` ends with the token on the CPU, so the device has finished."""
    started = time.perf_counter()
    subject.generate([sample], mode, max_new_tokens=1)
    return time.perf_counter() - started


def _peak_gb(subject: "Subject", sample: "Sample", mode: Mode) -> float:
    from fvlm_core.train.metrics import peak_memory_gb, reset_peak_memory

    reset_peak_memory(subject.device)
    _seconds(subject, sample, mode)
    return round(peak_memory_gb(subject.device), 4)


def _summary(seconds: Sequence[float], peak_gb: float) -> ModeLatency:
    low, median, high = (float(value) * 1000 for value in np.quantile(seconds, [0.25, 0.5, 0.75]))
    return ModeLatency(median_ms=round(median, 3), low_ms=round(low, 3), high_ms=round(high, 3), clips=len(seconds), peak_memory_gb=peak_gb)
