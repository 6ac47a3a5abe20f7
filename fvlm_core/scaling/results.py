"""The schema of `fits.json`, the results of the scaling study. This module does not import SciPy, so that reports can read it cheaply."""

from pydantic import Field

from fvlm_core.scaling.jobs import Quantity, Variant, Weights
from fvlm_core.settings import Settings


class HeldOut(Settings):
    """Prediction errors at the largest budget of a law fitted without it."""

    budget_flops: float
    law: str
    """Name of the law: the joint law, or each size's own law if the remaining runs do not determine the joint one."""
    mean_relative_error: Quantity
    """Mean absolute relative error over the runs of the largest budget."""
    bias: Quantity
    """Mean signed relative error; above 0 if the measured losses are higher than predicted."""


class VariantFits(Settings):
    """All fits to the runs of one variant."""

    law: dict[str, Quantity]
    """E, A, alpha, B, beta of L(N, D) = E + A / N^alpha + B / D^beta; N in parameters, D in labelled tokens. `ratio`: beta / (alpha +
    beta), the exponent of the best size over a budget C ~ N D."""
    law_huber: dict[str, Quantity]
    """The same law fitted by Huber loss on logarithms: a cross-check without intervals."""
    data: dict[str, Quantity]
    """beta of L = E + B / D^beta at fixed size, with one exponent for all sizes; E and B of each size as `E.size`, `B.size`."""
    iso_flop: dict[str, Quantity]
    """Best N of each budget, from a parabola."""
    allocation: dict[str, Quantity]
    """`exponent` of N* ~ C^exponent through the parabolas' vertices; biased, hence without an interval (`law.ratio` has one)."""
    residual: Quantity
    """Standard deviation of the law's relative errors."""
    noise: Quantity
    """Relative standard deviation of the loss over seeds, pooled over the cells with several seeds."""
    held_out: HeldOut | None


class Fits(Settings):
    """`fits.json`; identical points give identical bytes."""

    points_sha256: str
    """sha256 of `points.csv`."""
    weights: Weights
    variants: dict[Variant, VariantFits]
    crossover_flops: Quantity
    token_ratio_at_equal_loss: Quantity
    """Visual tokens that the baseline reads in training, divided by those of the foveated model, at the lowest loss that both reach."""
    chosen: str
    chosen_reason: str
    runner_up: str = ""
    margin_nats: float | None = None
    """Predicted (or measured) loss of the runner-up minus that of the chosen size."""
    wins_share: float | None = None
    """Share of residual resamples in which the chosen size beats the runner-up."""
    notes: list[str] = Field(default_factory=list)
