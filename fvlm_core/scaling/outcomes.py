"""What a run does beside its loss: whether it looks where it is asked to, and what that brings, on questions about places in videos.

The validation loss pools captions, questions in both orders and text, so a model that looks and one that does not can share it.
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
    """Of one run; None where the model has no such pass."""

    order_gain: float | None
    """Nats per answer token that fine passes gain over the coarse one, with the question first less with it after: the interaction of
    order and mode. Above 0: looking helps where the question is known in time."""
    on_target: float | None
    """Share of frames whose attention peak is on the asked place, fine, question first."""
    order_drift: float | None
    """Nats per answer token, autoregressive less fine, question first."""


class Questions:
    """The same questions for every run of a comparison."""

    def __init__(self, shards: Path, count: int, *, seed: int = 0) -> None:
        """`count` questions about places in videos of the validation split; there may be fewer, or none."""
        self.shards = ShardSet(shards)
        self.asked = ValidationSplit(self.shards, image_repeats=1, seed=seed).places(count)

    def outcomes(self, run: Path) -> Outcomes:
        """Of a finished run."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(run / MODEL_FOLDER).eval().requires_grad_(False).to(device)
        subject = Subject(model, self.shards.tokenizer, self.shards.chat, device, BATCH)
        if not subject.gazes or not self.asked:
            return Outcomes(None, None, None)
        return outcomes_of(subject, self.asked)


def outcomes_of(subject: Subject, asked: Sequence[ClipQuestion]) -> Outcomes:
    """Of a model that looks."""
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
