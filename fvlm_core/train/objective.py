"""What training lowers: cross-entropy of labelled tokens, or the DPO loss of preference pairs.

An objective gives sums over a micro-batch and says of how many units: tokens or pairs. The mean is over the units of the global
batch, so neither the number of ranks nor accumulation changes it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fvlm_core.config import LossSettings
from fvlm_core.data.batch import PackedBatch
from fvlm_core.model.attention import send
from fvlm_core.model.foveated import PassLosses
from fvlm_core.train.reference import Reference

Forward = Callable[..., PassLosses]
PREFERRED = "preferred"
"""The share of pairs whose chosen answer has gained on the rejected one, in the last pass."""


@dataclass(frozen=True)
class Sums:
    """What a micro-batch adds."""

    objective: Tensor
    """Scalar with a gradient."""
    parts: dict[str, Tensor]
    """Scalars to be logged, by the objective's `names`."""
    entropy: Tensor


class TokenLoss:
    """Cross-entropy, summed over labelled tokens."""

    def __init__(self, loss: LossSettings, passes: list[str]) -> None:
        self.loss, self.names = loss, passes

    def units(self, batch: PackedBatch) -> int:
        """Labelled tokens."""
        return batch.n_labels

    def __call__(self, forward: Forward, batch: PackedBatch, device: torch.device) -> Sums:
        """`forward`: the model's, on `device`; `batch` is in the host's memory."""
        losses = forward(batch.to(device), self.loss)
        return Sums(losses.objective, losses.sums, losses.entropy)


class PreferenceLoss:
    """DPO, summed over pairs: of each pass -log sigmoid(beta ((chosen - its reference) - (rejected - its reference))), weighted."""

    def __init__(self, loss: LossSettings, passes: list[str], beta: float, reference: Reference) -> None:
        self.loss, self.passes, self.beta, self.reference = loss, passes, beta, reference
        self.names = [*passes, PREFERRED]
        weights = [weight for weight in (loss.coarse, *loss.fine) if weight]
        self.weights = [weight / sum(weights) for weight in weights]

    def units(self, batch: PackedBatch) -> int:
        """Pairs."""
        return batch.n_samples // 2

    def __call__(self, forward: Forward, batch: PackedBatch, device: torch.device) -> Sums:
        """As `TokenLoss`. The reference is looked up by the host's batch, so that nothing waits for the device."""
        losses = forward(batch.to(device), self.loss, by_sample=True)
        log_probs = torch.stack([-losses.sums[name] for name in self.passes])
        gains = log_probs - send(self.reference.log_probs(batch).to(log_probs.dtype), device)  # [passes, samples]
        margins = gains[:, 0::2] - gains[:, 1::2]
        per_pass = F.softplus(-self.beta * margins).sum(1)
        objective = (per_pass * per_pass.new_tensor(self.weights)).sum()
        parts = dict(zip(self.passes, per_pass.detach(), strict=True)) | {PREFERRED: (margins[-1].detach() > 0).sum()}
        # the model's own objective touches every parameter, which the ranks' exchange of gradients needs
        return Sums(objective + 0.0 * losses.objective, parts, losses.entropy)


Objective = TokenLoss | PreferenceLoss
