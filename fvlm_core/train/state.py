"""The small state of a run: the part of a checkpoint besides tensors, and the sums between two evaluations."""

import math
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fvlm_core.config import MicroBatch
from fvlm_core.train.divergence import DivergenceDetector
from fvlm_core.train.jobs import Divergence, OutOfMemory

_JSON = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class Window(BaseModel):
    """Sums over the finite steps since the last evaluation. Part of checkpoints, so that a resumed run writes the same row."""

    model_config = _JSON

    units: int = 0
    """Number of labelled tokens or pairs."""
    steps: int = 0
    objective: float = 0.0
    losses: dict[str, float] = Field(default_factory=dict)
    """Sums of the objective's named values, e.g. the cross-entropy of each pass."""
    norms: dict[str, float] = Field(default_factory=dict)
    """Sum of gradient norms, by role."""
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
    """State of a run: equal on all ranks, serialisable to JSON, part of every checkpoint."""

    model_config = _JSON

    step: int = 0
    """Optimizer steps done; also the position of the data loader."""
    samples: int = 0
    frames: int = 0
    """Number of shown frames."""
    label_tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    """Time in training steps."""
    validation_s: float = 0.0
    skipped_steps: int = 0
    damaged: list[int] = Field(default_factory=list)
    """Indices of the damaged samples that any rank has read. Saved, so that a resumed run fails at the same number of them."""
    val_losses: dict[str, float] = Field(default_factory=dict)
    """Validation losses of the last evaluation, by pass."""
    evaluated: int = 0
    """Step of the last evaluation."""
    best_step: int = 0
    best_loss: float = math.inf
    resumed_from: list[int] = Field(default_factory=list)
    divergences: list[Divergence] = Field(default_factory=list)
    out_of_memory: list[OutOfMemory] = Field(default_factory=list)
    window: Window = Field(default_factory=Window)
    watch: DivergenceDetector = Field(default_factory=DivergenceDetector)

    def budget(self, first: MicroBatch) -> MicroBatch:
        """Return the current micro-batch budget: `first`, or a smaller one after out-of-memory errors."""
        return self.out_of_memory[-1].micro_batch if self.out_of_memory else first

    @property
    def validation_share(self) -> float:
        """Share of the time in steps and validation that validation took."""
        return self.validation_s / max(self.seconds + self.validation_s, 1e-9)

    @property
    def frozen(self) -> list[str]:
        """The parts frozen after divergences."""
        return [divergence.froze for divergence in self.divergences if divergence.froze]


def halved(budget: MicroBatch) -> MicroBatch | None:
    """Return half of a budget, or None if it is already at its minimum, one sample at a time."""
    if budget.frames == budget.tokens == 1:
        return None
    return MicroBatch(frames=max(1, budget.frames // 2), tokens=max(1, budget.tokens // 2))


@dataclass(frozen=True)
class StepResult:
    """The sums of one optimizer step, over all ranks."""

    units: int
    """Number of labelled tokens or pairs, over which the loss is averaged."""
    labels: int
    samples: int
    frames: int
    tokens: int
    flops: float
    objective: float
    """Sum of the loss over all units."""
    losses: dict[str, float]
    norms: dict[str, float]
    norm: float
    entropy: float
    """Attention entropy of the last pass in nats, summed over shown frames."""

    @property
    def loss(self) -> float:
        """Mean loss over the units of the global batch; 0 without units."""
        return self.objective / max(1, self.units)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.objective) and math.isfinite(self.norm)

    def count(self, state: RunState) -> str | None:
        """Add the step to the run's state. Returns the reason if training has diverged, otherwise None."""
        state.step += 1
        state.samples += self.samples
        state.frames += self.frames
        state.label_tokens += self.labels
        state.flops += self.flops
        state.skipped_steps += not self.finite
        if self.finite:  # a non-finite step would spoil the sums
            state.window.add(self)
        return state.watch.observe(self.loss, self.norm, self.entropy / self.frames if self.frames else 0.0)


@dataclass
class Clock:
    """Wall-clock times and throughput counts since the last evaluation. Not saved in checkpoints."""

    seconds: float = 0.0
    waited: float = 0.0
    """Seconds of waiting for data."""
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
        """Return the throughput columns of `metrics.csv`. `peak_flops`: peak FLOP/s of all devices together, None if unknown."""
        seconds = max(self.seconds, 1e-9)
        return {
            "samples_per_s": self.samples / seconds,
            "frames_per_s": self.frames / seconds,
            "tokens_per_s": self.tokens / seconds,
            "mfu": self.flops / seconds / peak_flops if peak_flops else None,
            "data_wait_share": self.waited / seconds,
        }
