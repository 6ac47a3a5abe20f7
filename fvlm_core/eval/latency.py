"""Latency per mode: from a clip's frames to the first token of the answer, one clip at a time, the modes taking turns."""

import time
from collections.abc import Sequence

import numpy as np
import torch

from fvlm_core.data.batch import Sample
from fvlm_core.eval.items import ClipQuestion, without_answer
from fvlm_core.eval.results import Latency, ModeLatency
from fvlm_core.eval.subject import Subject
from fvlm_core.model.names import Mode

ROUNDS = 3
"""Times each clip is timed in each mode; its fastest counts, which leaves out what else the machine was doing."""


def measure(subject: Subject, clips: Sequence[ClipQuestion], modes: Sequence[Mode]) -> Latency:
    """Time every mode on the same clips, side by side."""
    samples = [without_answer(clip.sample, question_first=clip.sample.question_first) for clip in clips]
    for mode in modes:
        _seconds(subject, samples[0], mode)  # the first call pays for what is set up once
    rounds = _rounds(subject, samples, modes)
    return Latency(
        device=torch.cuda.get_device_name() if subject.device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        frames=max(sum(map(len, sample.media)) for sample in samples),
        modes={mode: _summary([min(times) for times in zip(*rounds[mode], strict=True)]) for mode in modes},
    )


def _rounds(subject: Subject, samples: Sequence[Sample], modes: Sequence[Mode]) -> dict[Mode, list[list[float]]]:
    """Per mode and round, the seconds of each sample."""
    rounds: dict[Mode, list[list[float]]] = {mode: [[] for _ in range(ROUNDS)] for mode in modes}
    for number in range(ROUNDS):
        for sample in samples:
            for mode in modes:
                rounds[mode][number].append(_seconds(subject, sample, mode))
    return rounds


def _seconds(subject: Subject, sample: Sample, mode: Mode) -> float:
    """Packing, encoding, reading and the first token; `generate` ends with the token on the CPU, so the device has finished."""
    started = time.perf_counter()
    subject.generate([sample], mode, max_new_tokens=1)
    return time.perf_counter() - started


def _summary(seconds: Sequence[float]) -> ModeLatency:
    low, median, high = (float(value) * 1000 for value in np.quantile(seconds, [0.25, 0.5, 0.75]))
    return ModeLatency(median_ms=round(median, 3), low_ms=round(low, 3), high_ms=round(high, 3), clips=len(seconds))
