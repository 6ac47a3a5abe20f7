"""The schema of `fits.json`, what the scaling study found: light to import, so that reports read it without SciPy."""

from pydantic import Field

from fvlm_core.scaling.jobs import Quantity, Variant, Weights
from fvlm_core.settings import Settings


class HeldOut(Settings):
    """A law fitted without the largest budget, and asked for it."""

    budget_flops: float
    law: str
    """Which one: the joint law, or each size's own where the rest of the grid does not determine that."""
    mean_relative_error: Quantity
    """Of absolute values over the budget's runs."""
    bias: Quantity
    """The same with its sign: above 0 where the law promised too little."""


class VariantFits(Settings):
    """Everything fitted to the runs of one variant."""

    law: dict[str, Quantity]
    """E, A, alpha, B, beta of L(N, D) = E + A / N^alpha + B / D^beta; N in parameters, D in labelled tokens. `ratio`: beta / (alpha +
    beta), the exponent of the best size over a budget C ~ N D."""
    law_huber: dict[str, Quantity]
    """The same by Huber loss on logarithms: the cross-check, without intervals."""
    data: dict[str, Quantity]
    """beta of L = E + B / D^beta at fixed size, one exponent for all sizes; E and B of each size by `E.size`, `B.size`."""
    iso_flop: dict[str, Quantity]
    """Best N of every budget, by parabola."""
    allocation: dict[str, Quantity]
    """exponent of N* ~ C^exponent through the parabolas' vertices: biased, so without an interval (`law.ratio` has one)."""
    residual: Quantity
    """Standard deviation of the law's relative errors, for what it leaves unexplained."""
    noise: Quantity
    """Standard deviation of the losses of equal runs with other seeds, as a share of their mean, over the cells that have several."""
    held_out: HeldOut | None


class Fits(Settings):
    """`fits.json`: equal points give equal bytes."""

    points_sha256: str
    """Of `points.csv`."""
    weights: Weights
    variants: dict[Variant, VariantFits]
    crossover_flops: Quantity
    token_ratio_at_equal_loss: Quantity
    """Visual tokens that the baseline reads in training over those that the foveated model reads, at the best loss both reach."""
    chosen: str
    chosen_reason: str
    runner_up: str = ""
    margin_nats: float | None = None
    """Predicted (or measured) loss of the runner-up minus that of the chosen size."""
    wins_share: float | None = None
    """Share of the fit's resamples in which the chosen size beats the runner-up."""
    notes: list[str] = Field(default_factory=list)
