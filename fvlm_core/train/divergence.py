"""Notices that training diverges, and says what to freeze next.

Alarms are meant to be rare, because what follows is drastic: training goes back to the last good checkpoint and freezes the
vision encoder, next time the lower half of the language model's layers. One bad batch does not do it, nor the noise of small
batches: a sign must persist, and spikes are judged against the run's own history.
"""

import math
import re
from collections.abc import Collection

from pydantic import BaseModel, ConfigDict

from fvlm_core.model.foveated import FoveatedVLM

FREEZES = ("vision", "llm_lower")
"""What is frozen, in order."""
MARGIN_STEPS = 2
"""A checkpoint is a good place to go back to when this many healthy steps followed it: what breaks a model shows a step later."""
HISTORY_STEPS = 20
"""Healthy steps before spikes are judged."""
MEMORY = 0.98
"""Weight of the past in the running means: about 50 steps."""
NONFINITE_STEPS = 3
"""Consecutive steps with a loss or gradient that is not finite."""
SPIKE_STEPS = 5
"""Consecutive steps above the limits below."""
LOSS_DEVIATIONS, LOSS_RISE = 6.0, 0.5
"""A loss is a spike this many standard deviations, and this share, above its running mean."""
NORM_RISE = 100.0
"""A gradient norm is a spike at this multiple of its running (geometric) mean."""
ENTROPY_STEPS, ENTROPY_SHARE = 20, 1e-3
"""Attention has collapsed when its entropy stays below this share of the highest it was: queries see a single patch only."""


class Watch(BaseModel):
    """The watch's memory, small and JSON-able: it is part of every checkpoint."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    healthy: int = 0
    """Healthy steps seen."""
    loss_mean: float = 0.0
    loss_variance: float = 0.0
    log_norm_mean: float = 0.0
    entropy_highest: float = 0.0
    nonfinite: int = 0
    loss_spikes: int = 0
    norm_spikes: int = 0
    low_entropy: int = 0
    suspect_steps: int = 0
    """Steps since the first sign of an alarm that is pending, with that one; 0 where none is. More than any of the counts above
    where steps without frames lie between two of low entropy."""

    @property
    def alarmed(self) -> bool:
        """Whether the last step's loss or gradient was not healthy."""
        return bool(self.nonfinite or self.loss_spikes or self.norm_spikes)

    def observe(self, loss: float, norm: float, entropy: float) -> str | None:
        """Take in a step: its loss, gradient norm, and attention entropy (0 where there was none).

        Returns why training has diverged, or None.
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
        new = max(1 - MEMORY, 1 / (self.healthy + 1))  # a plain mean at first, a running one later
        change = loss - self.loss_mean
        self.loss_mean += new * change
        self.loss_variance = (1 - new) * (self.loss_variance + new * change**2)
        self.log_norm_mean += new * (log_norm - self.log_norm_mean)
        self.healthy += 1


def frozen_parameters(model: FoveatedVLM, freezes: Collection[str]) -> set[str]:
    """Names of the parameters that the freezes (of `FREEZES`) keep still."""
    names = [name for name, _ in model.named_parameters()]
    depth = len(model.llm.model.layers)
    frozen = {name for name in names if "vision" in freezes and model.role(name) == "vision"}
    if "llm_lower" in freezes:
        layer_of = {name: re.match(r"llm\.model\.layers\.(\d+)\.", name) for name in names}
        frozen |= {name for name, match in layer_of.items() if match and int(match[1]) < (depth + 1) // 2}
    return frozen


def next_freeze(model: FoveatedVLM, done: Collection[str]) -> str | None:
    """The first freeze that still changes something, or None when all are used up."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return next((freeze for freeze in FREEZES if freeze not in done and frozen_parameters(model, [freeze]) & trained), None)
