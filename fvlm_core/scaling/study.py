"""All fits to the runs of one variant, and comparisons between two variants.

Every fit is attempted and reported; one that the runs do not determine has a reason instead of a value.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from scipy.stats import chi2

from fvlm_core.scaling.fits import (
    NO_PARABOLA_INTERVAL,
    Allocation,
    DataLaw,
    Grid,
    Law,
    NotIdentifiableError,
    Parabola,
    crossover,
    data_law_quantities,
    fit_allocation,
    fit_data_law,
    fit_law,
    fit_law_huber,
    fit_parabola,
    law_quantities,
)
from fvlm_core.scaling.jobs import VARIANTS, GridPoint, Quantity, Variant, Weights
from fvlm_core.scaling.results import HeldOut, VariantFits

LAW_NUMBERS = ("E", "A", "alpha", "B", "beta", "ratio")
NO_HUBER_INTERVAL = "no interval: the cross-check"
Fit = TypeVar("Fit")


class Study:
    """The fits of one variant, with the fitted objects for plots."""

    def __init__(self, points: Sequence[GridPoint], *, weights: Weights) -> None:
        self.points = points
        self.weights: Weights = weights
        self.grid = to_grid(points)
        sizes = {point.params: point.size for point in points}
        self.law, law = self._try(lambda: law_quantities(self.grid, weights), LAW_NUMBERS)
        self.data_law, data = self._try(lambda: data_law_quantities(self.grid, weights), ("beta",))
        self.allocation, allocation = self._try(self._allocation, ("exponent",))
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
            residual=self._residual(),
            noise=noise_of(points),
            held_out=self._held_out(),
        )

    @property
    def best(self) -> dict[float, float]:
        """Lowest mean loss of each budget's cells; the minimum over single seeds would favour cells with more seeds."""
        return best_of(self.cells)

    @property
    def cells(self) -> dict[tuple[float, str], float]:
        """Mean loss by budget and size."""
        cells: dict[tuple[float, str], list[float]] = {}
        for point in self.points:
            cells.setdefault((point.budget_flops, point.size), []).append(point.loss)
        return {cell: float(np.mean(losses)) for cell, losses in cells.items()}

    @property
    def frontier(self) -> list[GridPoint]:
        """The Pareto frontier: runs with a lower loss than every run that read at most as many visual tokens."""
        kept: list[GridPoint] = []
        for point in sorted(self.points, key=lambda point: (point.visual_tokens, point.loss)):
            if not kept or point.loss < kept[-1].loss:
                kept.append(point)
        return kept

    @property
    def cost_per_token(self) -> np.ndarray:
        """Polynomial coefficients of log(FLOPs per labelled token) over log N; not simply 6 N, because the encoder's FLOPs count too."""
        spent = np.array([point.flops for point in self.points]) / self.grid.tokens
        degree = min(2, len(np.unique(self.grid.params)) - 1)
        return np.polyfit(np.log(self.grid.params), np.log(spent), degree)

    def _try(self, fit: Callable[[], tuple[Fit, dict[str, Quantity]]], names: Sequence[str]) -> tuple[Fit | None, dict[str, Quantity]]:
        try:
            return fit()
        except NotIdentifiableError as error:
            return None, {name: Quantity(value=None, reason=f"not identifiable: {error}") for name in names}

    def _allocation(self) -> tuple[Allocation, dict[str, Quantity]]:
        found = fit_allocation(self.grid)
        return found, {"exponent": Quantity(value=found.exponent, reason=NO_PARABOLA_INTERVAL)}

    def _huber(self) -> dict[str, Quantity]:
        try:
            law = fit_law_huber(self.grid)
        except NotIdentifiableError as error:
            return {name: Quantity(value=None, reason=f"not identifiable: {error}") for name in LAW_NUMBERS}
        return {name: Quantity(value=getattr(law, name), reason=NO_HUBER_INTERVAL) for name in LAW_NUMBERS}

    def _residual(self) -> Quantity:
        law = self.law or self.data_law
        degrees = Law.DEGREES if self.law else self.data_law.degrees if self.data_law else 0
        if law is None or len(self.grid) <= degrees:
            return Quantity(value=None, reason="no law was fitted that leaves runs to spare")
        errors = law.loss(self.grid.params, self.grid.tokens) / self.grid.loss - 1
        return Quantity(value=float(np.sqrt((errors**2).sum() / (len(self.grid) - degrees))))

    def _parabola(self, budget: float) -> Quantity:
        try:
            self.parabolas.append(fit_parabola(self.grid, budget))
            return Quantity(value=self.parabolas[-1].optimum())
        except NotIdentifiableError as error:
            return Quantity(value=None, reason=str(error))

    def _held_out(self) -> HeldOut | None:
        """Errors at the largest budget of a law fitted without it; None if there is only one budget."""
        budget = float(self.grid.budget.max())
        known, test = self.grid.take(np.flatnonzero(self.grid.budget < budget)), self.grid.take(np.flatnonzero(self.grid.budget == budget))
        if not len(known):
            return None
        reasons = []
        for name, fit in (("the joint law", fit_law), ("each size's own law over data", fit_data_law)):
            try:
                errors = self._errors(fit(known, self.weights), test)
            except NotIdentifiableError as error:
                reasons.append(f"{name}: {error}")
                continue
            mean, bias = (Quantity(value=float(value.mean()), reason=f"{len(errors)} runs") for value in (np.abs(errors), errors))
            return HeldOut(budget_flops=budget, law=name, mean_relative_error=mean, bias=bias)
        nothing = Quantity(value=None, reason=f"without the largest budget no law is identifiable: {'; '.join(reasons)}")
        return HeldOut(budget_flops=budget, law="", mean_relative_error=nothing, bias=nothing)

    @staticmethod
    def _errors(law: Law | DataLaw, test: Grid) -> np.ndarray:
        """Relative prediction errors of a law, one per run; runs of a size that the law does not cover are left out."""
        known = np.isin(test.params, law.sizes) if isinstance(law, DataLaw) else np.full(len(test), True)
        if not known.any():
            raise NotIdentifiableError("no size of the largest budget was run at another")
        test = test.take(np.flatnonzero(known))
        return test.loss / law.loss(test.params, test.tokens) - 1


def noise_of(points: Sequence[GridPoint]) -> Quantity:
    """Relative standard deviation of the loss over seeds, pooled over the cells with several seeds."""
    cells: dict[tuple[str, float], list[float]] = {}
    for point in points:
        cells.setdefault((point.size, point.budget_flops), []).append(point.loss)
    several = [np.array(losses) / np.mean(losses) for losses in cells.values() if len(losses) > 1]
    spare = sum(len(losses) - 1 for losses in several)
    if not spare:
        return Quantity(value=None, reason="noise not measured: one seed per cell")
    squares = sum(float(((losses - 1) ** 2).sum()) for losses in several)
    low, high = chi2.ppf((0.975, 0.025), spare)
    return Quantity(
        value=float(np.sqrt(squares / spare)),
        low=float(np.sqrt(squares / low)),
        high=float(np.sqrt(squares / high)),
        reason=f"{len(several)} cells with several seeds",
    )


def to_grid(points: Sequence[GridPoint]) -> Grid:
    """Convert points to arrays."""
    columns = zip(*((point.params, point.tokens, point.loss, point.budget_flops) for point in points), strict=True)
    return Grid(*(np.array(column, dtype=np.float64) for column in columns))


def best_of(cells: Mapping[tuple[float, str], float]) -> dict[float, float]:
    """The lowest loss of each budget, from losses by budget and size."""
    return {budget: min(loss for (one, _), loss in cells.items() if one == budget) for budget in sorted({budget for budget, _ in cells})}


def crossover_of(studies: dict[Variant, Study]) -> Quantity:
    """The budget at which the better variant changes. Only cells that both variants have are compared, because runs may have diverged."""
    if len(studies) < len(VARIANTS):
        return Quantity(value=None, reason="only one variant was run")
    cells = [studies[variant].cells for variant in VARIANTS]
    shared = cells[0].keys() & cells[1].keys()
    ours, theirs = (best_of({cell: one[cell] for cell in shared}) for one in cells)
    budgets = sorted(ours.keys() & theirs.keys())
    try:
        return Quantity(
            value=crossover(budgets, [ours[c] - theirs[c] for c in budgets]),
            reason="no interval: the budgets' best cells are compared as measured",
        )
    except NotIdentifiableError as error:
        return Quantity(value=None, reason=str(error))


def token_ratio_of(studies: dict[Variant, Study]) -> Quantity:
    """Visual tokens of the baseline divided by those of the foveated variant, at the lowest loss that both reach.

    Interpolated along the frontiers in log tokens.
    """
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
