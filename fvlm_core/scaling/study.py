"""The fits of one variant's runs, and what two variants say of each other.

Every fit is tried and reported; one that the runs do not determine has no value and says why.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fvlm_core.scaling.fits import (
    Fit,
    Grid,
    NotIdentifiableError,
    Parabola,
    crossover,
    fit_allocation,
    fit_data_law,
    fit_law,
    fit_law_huber,
    fit_parabola,
    quantities,
)
from fvlm_core.scaling.jobs import VARIANTS, GridPoint, Quantity, Variant
from fvlm_core.scaling.results import HeldOut, VariantFits

LAW_NUMBERS = ("E", "A", "alpha", "B", "beta")


class Study:
    """The fits of one variant, with the objects that plots draw."""

    def __init__(self, points: Sequence[GridPoint], *, resamples: int, seed: int) -> None:
        self.points = points
        self.grid = to_grid(points)
        sizes = {point.params: point.size for point in points}
        self.law, law = self._try(fit_law, LAW_NUMBERS, resamples, seed)
        self.data_law, data = self._try(fit_data_law, ("beta",), resamples, seed)
        self.allocation, allocation = self._try(fit_allocation, ("exponent",), resamples, seed)
        self.parabolas: list[Parabola] = []
        iso_flop: dict[str, Quantity] = {}
        for budget in np.unique(self.grid.budget):
            iso_flop[f"{budget:.3e}"] = self._parabola(budget)
        if self.data_law is not None:
            for params, e, b in zip(self.data_law.sizes, self.data_law.E, self.data_law.B, strict=True):
                data |= {f"E.{sizes[int(params)]}": Quantity(value=float(e)), f"B.{sizes[int(params)]}": Quantity(value=float(b))}
        self.fits = VariantFits(
            law=law,
            law_huber=self._huber(),
            data=data,
            iso_flop=iso_flop,
            allocation=allocation,
            held_out=self._held_out(),
        )

    @property
    def best(self) -> dict[float, float]:
        """Lowest loss of every budget."""
        return {float(budget): float(self.grid.loss[self.grid.budget == budget].min()) for budget in np.unique(self.grid.budget)}

    @property
    def frontier(self) -> list[GridPoint]:
        """Runs that no other run beats with as few visual tokens."""
        kept: list[GridPoint] = []
        for point in sorted(self.points, key=lambda point: (point.visual_tokens, point.loss)):
            if not kept or point.loss < kept[-1].loss:
                kept.append(point)
        return kept

    @property
    def cost_per_token(self) -> np.ndarray:
        """Coefficients of log(FLOPs per labelled token) over log N: the encoder costs too, so it is not 6 N."""
        spent = np.array([point.flops for point in self.points]) / self.grid.tokens
        degree = min(2, len(np.unique(self.grid.params)) - 1)
        return np.polyfit(np.log(self.grid.params), np.log(spent), degree)

    def _try(self, fit: Callable[[Grid], Fit], names: Sequence[str], resamples: int, seed: int) -> tuple[Fit | None, dict[str, Quantity]]:
        try:
            return quantities(self.grid, fit, resamples=resamples, seed=seed)
        except NotIdentifiableError as error:
            return None, {name: Quantity(value=None, reason=f"not identifiable: {error}") for name in names}

    def _huber(self) -> dict[str, Quantity]:
        try:
            return {name: Quantity(value=value) for name, value in fit_law_huber(self.grid).numbers().items()}
        except NotIdentifiableError as error:
            return {name: Quantity(value=None, reason=f"not identifiable: {error}") for name in LAW_NUMBERS}

    def _parabola(self, budget: float) -> Quantity:
        try:
            self.parabolas.append(fit_parabola(self.grid, budget))
            return Quantity(value=self.parabolas[-1].optimum())
        except NotIdentifiableError as error:
            return Quantity(value=None, reason=str(error))

    def _held_out(self) -> HeldOut | None:
        """None where there is one budget only."""
        budget = float(self.grid.budget.max())
        known, held = np.flatnonzero(self.grid.budget < budget), np.flatnonzero(self.grid.budget == budget)
        if not len(known):
            return None
        try:
            test = self.grid.take(held)
            error = float(np.abs(fit_law(self.grid.take(known)).predict(test) / test.loss - 1).mean())
            return HeldOut(budget_flops=budget, mean_relative_error=Quantity(value=error))
        except NotIdentifiableError as reason:
            nothing = Quantity(value=None, reason=f"without the largest budget the law is not identifiable: {reason}")
            return HeldOut(budget_flops=budget, mean_relative_error=nothing)


def to_grid(points: Sequence[GridPoint]) -> Grid:
    """Points as arrays."""
    columns = zip(*((point.params, point.tokens, point.loss, point.budget_flops) for point in points), strict=True)
    return Grid(*(np.array(column, dtype=np.float64) for column in columns))


def crossover_of(studies: dict[Variant, Study]) -> Quantity:
    """The budget at which the better variant changes."""
    if len(studies) < len(VARIANTS):
        return Quantity(value=None, reason="only one variant was run")
    ours, theirs = (studies[variant].best for variant in VARIANTS)
    budgets = sorted(ours.keys() & theirs.keys())
    try:
        return Quantity(value=crossover(budgets, [ours[c] - theirs[c] for c in budgets]), reason="no interval: one run per cell")
    except NotIdentifiableError as error:
        return Quantity(value=None, reason=str(error))


def token_ratio_of(studies: dict[Variant, Study]) -> Quantity:
    """At the lowest loss that both variants reach, interpolated along the frontiers in log tokens."""
    if len(studies) < len(VARIANTS):
        return Quantity(value=None, reason="only one variant was run")
    fronts = [studies[variant].frontier for variant in VARIANTS]
    target = max(front[-1].loss for front in fronts)
    if any(front[0].loss < target for front in fronts):
        return Quantity(value=None, reason="the frontiers share no loss")
    ours, theirs = (
        np.interp(-target, [-point.loss for point in front], np.log([max(1, point.visual_tokens) for point in front])) for front in fronts
    )
    return Quantity(value=float(np.exp(theirs - ours)), reason=f"at a loss of {target:.4f}")
