"""The schema of `fits.json`, what the scaling study found: light to import, so that reports read it without SciPy."""

from pydantic import Field

from fvlm_core.scaling.jobs import Quantity, Variant
from fvlm_core.settings import Settings


class HeldOut(Settings):
    """The joint law fitted without the largest budget, and asked for it."""

    budget_flops: float
    mean_relative_error: Quantity


class VariantFits(Settings):
    """Everything fitted to the runs of one variant."""

    law: dict[str, Quantity]
    """E, A, alpha, B, beta of L(N, D) = E + A / N^alpha + B / D^beta; N in parameters, D in labelled tokens."""
    law_huber: dict[str, Quantity]
    """The same by Huber loss on logarithms and L-BFGS: the cross-check."""
    data: dict[str, Quantity]
    """beta of L = E + B / D^beta at fixed size, one exponent for all sizes; E and B of each size by `E.size`, `B.size`."""
    iso_flop: dict[str, Quantity]
    """Best N of every budget, by parabola."""
    allocation: dict[str, Quantity]
    """exponent of N* ~ C^exponent."""
    held_out: HeldOut | None


class Fits(Settings):
    """`fits.json`: equal points and seed give equal bytes."""

    points_sha256: str
    """Of `points.csv`."""
    seed: int
    resamples: int
    variants: dict[Variant, VariantFits]
    crossover_flops: Quantity
    token_ratio_at_equal_loss: Quantity
    """Visual tokens that the baseline reads in training over those that the foveated model reads, at the best loss both reach."""
    chosen: str
    chosen_reason: str
    notes: list[str] = Field(default_factory=list)
