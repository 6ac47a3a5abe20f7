"""Outcomes of a run other than its loss: whether it looks at the asked place, and whether that helps, on questions about places in videos.

The validation loss pools captions, questions in both orders and text, so a model that looks and one that does not can have the same loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fvlm_core.data.shard_set import ShardSet
from fvlm_core.eval.parts.question_order import gaze_hits
from fvlm_core.eval.questions import ClipQuestion
from fvlm_core.eval.subject import Subject
from fvlm_core.eval.validation import ValidationSplit
from fvlm_core.model.build import load_model
from fvlm_core.model.names import Mode
from fvlm_core.train.jobs import MODEL_FOLDER

BATCH = 64


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of one run; None for a model without queries."""

    order_gain: float | None
    """Gain of the fine over the coarse pass with the question first, minus that with the question after, in nats per answer token: the
    interaction of order and mode. Above 0, looking helps if the question is known in time."""
    on_target: float | None
    """Share of frames whose attention peak is on the asked place, in the fine pass with the question first."""
    order_drift: float | None
    """Autoregressive loss minus loss of the fine pass, question first, in nats per answer token."""


class Questions:
    """The same questions for every run of a comparison."""

    def __init__(self, shards: Path, count: int, *, seed: int = 0) -> None:
        """Select up to `count` questions about places in videos of the validation split; there may be none."""
        self.shards = ShardSet(shards)
        self.asked = ValidationSplit(self.shards, image_repeats=1, seed=seed).places(count)

    def outcomes(self, run: Path) -> Outcomes:
        """Measure the outcomes of a finished run."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(run / MODEL_FOLDER).eval().requires_grad_(False).to(device)
        subject = Subject(model, self.shards.tokenizer, self.shards.chat, device, BATCH)
        if not subject.gazes or not self.asked:
            return Outcomes(None, None, None)
        return outcomes_of(subject, self.asked)


def outcomes_of(subject: Subject, asked: Sequence[ClipQuestion]) -> Outcomes:
    """Measure the outcomes of a model with queries."""
    samples = {first: [replace(one.sample, question_first=first) for one in asked] for first in (True, False)}
    modes: list[Mode] = ["coarse_only", "coarse_fine", "autoregressive"]
    first = _losses(subject, samples[True], modes)
    after = _losses(subject, samples[False], modes[:2])
    maps = subject.gaze(samples[True], "coarse_fine")
    hits = np.concatenate([gaze_hits(attention, one.cells or []) for attention, one in zip(maps, asked, strict=True)])
    return Outcomes(
        order_gain=(first["coarse_only"] - first["coarse_fine"]) - (after["coarse_only"] - after["coarse_fine"]),
        on_target=float(hits.mean()),
        order_drift=first["autoregressive"] - first["coarse_fine"],
    )


def _losses(subject: Subject, samples: list, modes: list[Mode]) -> dict[Mode, float]:
    rows = subject.sample_losses(samples, modes)
    return {mode: float(rows[mode][:, 0].sum() / rows[mode][:, 1].sum()) for mode in modes}
