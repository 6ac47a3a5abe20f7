"""Detect divergence of training, and choose what to freeze after it.

Alarms must be rare because the response is drastic: training rolls back to the last good checkpoint and freezes the vision encoder, the
next time the lower half of the language model's layers. A single bad batch or the noise of small batches must not cause an alarm, so a sign
has to persist, and spikes are measured against the run's own history.
"""

import math
import re
from collections.abc import Collection

from pydantic import BaseModel, ConfigDict

from fvlm_core.model.foveated import FoveatedVLM

FREEZES = ("vision", "llm_lower")
"""Parts to freeze, in order."""
MARGIN_STEPS = 2
"""Healthy steps that must follow a checkpoint before it can be a rollback target: damage to a model shows only one step later."""
HISTORY_STEPS = 20
"""Number of healthy steps before spikes are detected."""
MEMORY = 0.98
"""Decay of the exponential moving averages, equivalent to about 50 steps."""
NONFINITE_STEPS = 3
"""Number of consecutive steps with a non-finite loss or gradient norm that raises an alarm."""
SPIKE_STEPS = 5
"""Number of consecutive spikes, as defined below, that raises an alarm."""
LOSS_DEVIATIONS, LOSS_RISE = 6.0, 0.5
"""A loss is a spike if it exceeds its running mean by this many standard deviations and by this share of the mean."""
NORM_RISE = 100.0
"""A gradient norm is a spike if it exceeds this multiple of its running geometric mean."""
ENTROPY_STEPS, ENTROPY_SHARE = 20, 1e-3
"""Attention has collapsed, to a single patch, if its entropy stays below this share of its maximum for this many steps."""


class DivergenceDetector(BaseModel):
    """Divergence detector. Its state is small and serialisable to JSON; every checkpoint includes it."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    healthy: int = 0
    """Number of healthy steps so far."""
    loss_mean: float = 0.0
    loss_variance: float = 0.0
    log_norm_mean: float = 0.0
    entropy_highest: float = 0.0
    nonfinite: int = 0
    loss_spikes: int = 0
    norm_spikes: int = 0
    low_entropy: int = 0
    suspect_steps: int = 0
    """Number of steps since the first sign of a pending alarm, including that step; 0 without one. It can exceed all counts above if
    steps without frames lie between steps of low entropy."""

    @property
    def alarmed(self) -> bool:
        """Whether the last step's loss or gradient norm was non-finite or a spike."""
        return bool(self.nonfinite or self.loss_spikes or self.norm_spikes)

    def observe(self, loss: float, norm: float, entropy: float) -> str | None:
        """Record the loss, gradient norm and attention entropy (0 without frames) of a step.

        Returns the reason if training has diverged, otherwise None.
        """
        reason = self._judge(loss, norm, entropy)
        self.suspect_steps = self.suspect_steps + 1 if self.alarmed or self.low_entropy else 0
        return reason

    def _judge(self, loss: float, norm: float, entropy: float) -> str | None:
        finite = math.isfinite(loss) and math.isfinite(norm)
        self.nonfinite = 0 if finite else self.nonfinite + 1
        if not finite:
            return f"loss {loss} or gradient norm {norm} not finite {self.nonfinite} times" if self.nonfinite >= NONFINITE_STEPS else None
        judged = self.healthy >= HISTORY_STEPS
        limit = self.loss_mean + max(LOSS_DEVIATIONS * math.sqrt(self.loss_variance), LOSS_RISE * abs(self.loss_mean))
        self.loss_spikes = self.loss_spikes + 1 if judged and loss > limit else 0
        log_norm = math.log(norm) if norm > 0 else self.log_norm_mean
        self.norm_spikes = self.norm_spikes + 1 if judged and log_norm > self.log_norm_mean + math.log(NORM_RISE) else 0
        if entropy > 0:
            self.low_entropy = self.low_entropy + 1 if entropy < ENTROPY_SHARE * self.entropy_highest else 0
            self.entropy_highest = max(self.entropy_highest, entropy)
        if not self.alarmed:
            self._remember(loss, log_norm)
        if self.loss_spikes >= SPIKE_STEPS:
            return f"loss {loss:.4g} far above its running mean {self.loss_mean:.4g} for {self.loss_spikes} steps"
        if self.norm_spikes >= SPIKE_STEPS:
            return f"gradient norm {norm:.4g} far above its running mean {math.exp(self.log_norm_mean):.4g} for {self.norm_spikes} steps"
        if self.low_entropy >= ENTROPY_STEPS:
            return f"attention entropy {entropy:.3g} collapsed from {self.entropy_highest:.3g} for {self.low_entropy} steps"
        return None

    def _remember(self, loss: float, log_norm: float) -> None:
        new = max(1 - MEMORY, 1 / (self.healthy + 1))  # a plain mean at first, a moving average later
        change = loss - self.loss_mean
        self.loss_mean += new * change
        self.loss_variance = (1 - new) * (self.loss_variance + new * change**2)
        self.log_norm_mean += new * (log_norm - self.log_norm_mean)
        self.healthy += 1


def frozen_parameters(model: FoveatedVLM, freezes: Collection[str]) -> set[str]:
    """Return the names of the parameters that `freezes` (a subset of `FREEZES`) freeze."""
    names = [name for name, _ in model.named_parameters()]
    depth = len(model.llm.model.layers)
    frozen = {name for name in names if "vision" in freezes and model.role(name) == "vision"}
    if "llm_lower" in freezes:
        layer_of = {name: re.match(r"llm\.model\.layers\.(\d+)\.", name) for name in names}
        frozen |= {name for name, match in layer_of.items() if match and int(match[1]) < (depth + 1) // 2}
    return frozen


def next_freeze(model: FoveatedVLM, done: Collection[str]) -> str | None:
    """Return the first entry of `FREEZES` that is not done and would freeze trained parameters, or None."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return next((freeze for freeze in FREEZES if freeze not in done and frozen_parameters(model, [freeze]) & trained), None)
