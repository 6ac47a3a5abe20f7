"""A run's small state: what a checkpoint keeps besides tensors, and the sums between two evaluation points."""

import math
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fvlm_core.config import MicroBatch
from fvlm_core.train.divergence import Watch
from fvlm_core.train.jobs import Divergence, OutOfMemory

_JSON = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class Window(BaseModel):
    """Sums over the steps since the last evaluation point that were finite; saved, so that a resumed run writes the same row."""

    model_config = _JSON

    units: int = 0
    """Labelled tokens, or pairs."""
    steps: int = 0
    objective: float = 0.0
    losses: dict[str, float] = Field(default_factory=dict)
    """What the objective names, summed: per pass its cross-entropy, for one."""
    norms: dict[str, float] = Field(default_factory=dict)
    """Per role, the sum of gradient norms."""
    entropy: float = 0.0
    frames: int = 0

    def add(self, step: "StepResult") -> None:
        """Count a step."""
        self.units += step.units
        self.steps += 1
        self.objective += step.objective
        self.entropy += step.entropy
        self.frames += step.frames
        for sums, values in ((self.losses, step.losses), (self.norms, step.norms)):
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value


class RunState(BaseModel):
    """Equal on all ranks, JSON-able, part of every checkpoint."""

    model_config = _JSON

    step: int = 0
    """Optimizer steps done, and the position of the loader."""
    samples: int = 0
    frames: int = 0
    """Shown frames."""
    label_tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    """Of training steps."""
    validation_s: float = 0.0
    skipped_steps: int = 0
    damaged: list[int] = Field(default_factory=list)
    """Numbers of the damaged samples that any rank has met: a resumed run stops at the same number of them."""
    val_losses: dict[str, float] = Field(default_factory=dict)
    """Of the last evaluation, per pass."""
    evaluated: int = 0
    """The step of the last evaluation."""
    best_step: int = 0
    best_loss: float = math.inf
    resumed_from: list[int] = Field(default_factory=list)
    divergences: list[Divergence] = Field(default_factory=list)
    out_of_memory: list[OutOfMemory] = Field(default_factory=list)
    window: Window = Field(default_factory=Window)
    watch: Watch = Field(default_factory=Watch)

    def budget(self, first: MicroBatch) -> MicroBatch:
        """Of a micro-batch: `first`, or what is left of it after the times that one did not fit into memory."""
        return self.out_of_memory[-1].micro_batch if self.out_of_memory else first

    @property
    def validation_share(self) -> float:
        """Of the time in steps and validation."""
        return self.validation_s / max(self.seconds + self.validation_s, 1e-9)

    @property
    def frozen(self) -> list[str]:
        """What divergences have frozen."""
        return [divergence.froze for divergence in self.divergences if divergence.froze]


def halved(budget: MicroBatch) -> MicroBatch | None:
    """Half of a budget; None where it is at its least, a sample at a time."""
    if budget.frames == budget.tokens == 1:
        return None
    return MicroBatch(frames=max(1, budget.frames // 2), tokens=max(1, budget.tokens // 2))


@dataclass(frozen=True)
class StepResult:
    """The sums of one optimizer step, over all ranks."""

    units: int
    """What the loss is the mean over: labelled tokens, or pairs."""
    labels: int
    samples: int
    frames: int
    tokens: int
    flops: float
    objective: float
    """Sum over the units."""
    losses: dict[str, float]
    norms: dict[str, float]
    norm: float
    entropy: float
    """Of the last pass's attention, summed over the shown frames."""

    @property
    def loss(self) -> float:
        """Mean over the units of the global batch; 0 where it has none."""
        return self.objective / max(1, self.units)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.objective) and math.isfinite(self.norm)

    def count(self, state: RunState) -> str | None:
        """Add the step to the run's state. Returns why training has diverged, or None."""
        state.step += 1
        state.samples += self.samples
        state.frames += self.frames
        state.label_tokens += self.labels
        state.flops += self.flops
        state.skipped_steps += not self.finite
        if self.finite:  # one that is not would make the sums of all the others NaN
            state.window.add(self)
        return state.watch.observe(self.loss, self.norm, self.entropy / self.frames if self.frames else 0.0)


@dataclass
class Clock:
    """Wall-clock sums since the last evaluation point: how fast the run is, not what it computes."""

    seconds: float = 0.0
    waited: float = 0.0
    """For data."""
    samples: int = 0
    frames: int = 0
    tokens: int = 0
    flops: float = 0.0

    def add(self, step: StepResult, *, seconds: float, waited: float) -> None:
        """Count a step."""
        self.seconds += seconds
        self.waited += waited
        self.samples += step.samples
        self.frames += step.frames
        self.tokens += step.tokens
        self.flops += step.flops

    def rates(self, peak_flops: float | None) -> dict[str, Any]:
        """The throughput columns of `metrics.csv`; `peak_flops` of all devices together, None where unknown."""
        seconds = max(self.seconds, 1e-9)
        return {
            "samples_per_s": self.samples / seconds,
            "frames_per_s": self.frames / seconds,
            "tokens_per_s": self.tokens / seconds,
            "mfu": self.flops / seconds / peak_flops if peak_flops else None,
            "data_wait_share": self.waited / seconds,
        }
