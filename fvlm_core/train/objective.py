"""Training objectives: cross-entropy of labelled tokens, or the DPO loss of preference pairs.

An objective returns sums over a micro-batch and counts its units, tokens or pairs. The loss is the mean over the units of the global batch,
so it does not depend on the number of ranks or on gradient accumulation. DPO: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fvlm_core.config import LossSettings
from fvlm_core.data.batch import PackedBatch
from fvlm_core.model.attention import to_device_async
from fvlm_core.model.foveated import PassLosses
from fvlm_core.train.reference import ReferenceLogProbs

Forward = Callable[..., PassLosses]
PREFERRED = "preferred"
"""Metric: share of pairs whose chosen answer gained on the rejected one relative to the reference, in the last pass."""


@dataclass(frozen=True)
class Sums:
    """Sums over a micro-batch."""

    objective: Tensor
    """Differentiable scalar."""
    parts: dict[str, Tensor]
    """Scalars to log, by the objective's `names`."""
    entropy: Tensor
    """Mean attention entropy; see `PassLosses.entropy`."""


class TokenLoss:
    """Cross-entropy, summed over labelled tokens."""

    def __init__(self, loss: LossSettings, passes: list[str]) -> None:
        self.loss, self.names = loss, passes

    def units(self, batch: PackedBatch) -> int:
        """Number of labelled tokens."""
        return batch.n_labels

    def __call__(self, forward: Forward, batch: PackedBatch, device: torch.device) -> Sums:
        """Compute the loss. `forward`: training forward of a model on `device`. `batch`: on CPU."""
        losses = forward(batch.to(device), self.loss)
        return Sums(losses.objective, losses.sums, losses.entropy)


class PreferenceLoss:
    """DPO, summed over pairs: weighted mean over passes of -log sigmoid(beta * ((chosen - reference) - (rejected - reference))).

    `chosen` and `rejected` are log-probabilities of the two answers, each compared with the reference model's log-probability of it.
    """

    def __init__(self, loss: LossSettings, passes: list[str], beta: float, reference: ReferenceLogProbs) -> None:
        self.loss, self.passes, self.beta, self.reference = loss, passes, beta, reference
        self.names = [*passes, PREFERRED]
        weights = [weight for weight in (loss.coarse, *loss.fine) if weight]
        self.weights = [weight / sum(weights) for weight in weights]

    def units(self, batch: PackedBatch) -> int:
        """Number of pairs."""
        return batch.n_samples // 2

    def __call__(self, forward: Forward, batch: PackedBatch, device: torch.device) -> Sums:
        """As `TokenLoss`. The reference is looked up with the batch on CPU, to avoid a device synchronisation."""
        losses = forward(batch.to(device), self.loss, by_sample=True)
        log_probs = torch.stack([-losses.sums[name] for name in self.passes])
        gains = log_probs - to_device_async(self.reference.log_probs(batch).to(log_probs.dtype), device)  # [passes, samples]
        margins = gains[:, 0::2] - gains[:, 1::2]
        per_pass = F.softplus(-self.beta * margins).sum(1)
        objective = (per_pass * per_pass.new_tensor(self.weights)).sum()
        parts = dict(zip(self.passes, per_pass.detach(), strict=True)) | {PREFERRED: (margins[-1].detach() > 0).sum()}
        # the model's own objective gives every parameter a gradient, as the gradient reduction over ranks requires
        return Sums(objective + 0.0 * losses.objective, parts, losses.entropy)


Objective = TokenLoss | PreferenceLoss
