"""Fit scaling laws to a grid of runs: quantities that the runs determine get an interval, the others a reason why they cannot be fitted.

The joint law is L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556), fitted by variable
projection (`varpro`) to relative errors (`weights: relative`; to first order, errors of the logarithms) or to errors in nats (`unit`). The
original method, Huber loss on logarithms, is a cross-check; unlike the original, whose optimiser stopped early, it sums the losses and uses
tighter tolerances (Besiroglu et al. 2024, https://arxiv.org/abs/2404.10102). IsoFLOP parabolas give the best size per budget without a law;
the exponent through their vertices is biased (Czech et al. 2026, https://arxiv.org/abs/2603.22339), so it has no interval and is reported
beside that of the law.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, ClassVar

import numpy as np
from scipy.optimize import least_squares, minimize_scalar, nnls
from scipy.special import huber, logsumexp, softmax

from fvlm_core.scaling.intervals import allowed_squares, profile_interval
from fvlm_core.scaling.jobs import Quantity, Weights
from fvlm_core.scaling.varpro import BOUND_MARGIN, EXPONENT_BOUNDS, EXPONENT_GRID, FixedParameter, Minimum, Name, Projection

MIN_SIZES = MIN_AMOUNTS = 4
"""Number of distinct values needed to fit an exponent: with three, E, a factor and an exponent fit any data."""
SPARE_RUNS = 3
"""Number of runs needed beyond the number of fitted parameters: with fewer, the residuals say nothing about the noise."""
MIN_TERM_SHARE = 0.01
"""A term whose range is below this share of the losses' range does not determine its exponent."""
HUBER_DELTA = 1e-3
HUBER_STARTS, HUBER_EVALUATIONS = 3, 150
MIN_VERTICES = 3
"""Number of budgets with a best size inside the grid that the power law through them needs."""
NO_PARABOLA_INTERVAL = "no interval: the exponent through parabolas' vertices is biased; the joint law's has one"


class NotIdentifiableError(ValueError):
    """The points do not determine the law; the message says why."""


@dataclass(frozen=True)
class Grid:
    """Runs as arrays of equal length."""

    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    budget: np.ndarray
    """Nominal training FLOPs."""

    def __post_init__(self) -> None:
        """Raise ValueError for values that are not finite and positive."""
        for name, values in (("params", self.params), ("tokens", self.tokens), ("loss", self.loss), ("budget", self.budget)):
            if not (np.isfinite(values).all() and (values > 0).all()):
                raise ValueError(f"{name} must be finite and above 0, got {values[~(np.isfinite(values) & (values > 0))][:3].tolist()}")

    def take(self, index: np.ndarray) -> "Grid":
        return Grid(self.params[index], self.tokens[index], self.loss[index], self.budget[index])

    def __len__(self) -> int:
        return len(self.loss)


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    projection: Projection | None = field(default=None, repr=False, compare=False)
    """The fit's problem, for refitting resampled runs."""

    DEGREES: ClassVar[int] = 5

    @classmethod
    def of(cls, best: Minimum, projection: Projection) -> "Law":
        """Convert the minimum of a fit to a law."""
        e, a, b = (float(factor) for factor in best.factors)
        scaled_a, scaled_b = a * np.exp(best.alpha * projection.scale_n), b * np.exp(best.beta * projection.scale_d)
        return cls(e, float(scaled_a), best.alpha, float(scaled_b), best.beta, projection)

    @property
    def ratio(self) -> float:
        """The exponent of the best size over a budget C ~ N D."""
        return self.beta / (self.alpha + self.beta)

    def loss(self, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Predicted losses for any sizes and amounts of data."""
        return self.E + self.A * np.power(params, -self.alpha) + self.B * np.power(tokens, -self.beta)


@dataclass(frozen=True)
class DataLaw:
    """L = E + B / D^beta for each of S sizes, with one exponent for all of them."""

    beta: float
    sizes: np.ndarray
    """[S]: parameter counts, ascending."""
    E: np.ndarray
    B: np.ndarray

    @property
    def degrees(self) -> int:
        """Number of fitted parameters."""
        return 1 + 2 * len(self.sizes)

    def loss(self, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Predicted losses for fitted sizes and any amounts of data."""
        which = np.searchsorted(self.sizes, params)
        return self.E[which] + self.B[which] * np.power(tokens, -self.beta)


@dataclass(frozen=True)
class Parabola:
    """A parabola through the losses of one budget over log N."""

    budget: float
    curve: np.poly1d
    """Loss as a function of log N - `centre`."""
    centre: float
    sizes: tuple[float, float]
    """Smallest and largest N of the grid."""

    def loss(self, params: np.ndarray) -> np.ndarray:
        """Predicted losses of sizes at this budget."""
        return self.curve(np.log(params) - self.centre)

    def optimum(self) -> float:
        """The best size, in parameters. Raises NotIdentifiableError if it is not inside the grid."""
        bend, slope = self.curve[2], self.curve[1]  # indexed by power, because poly1d drops leading zeros
        if bend <= 0:
            raise NotIdentifiableError("the losses do not bend upwards: no best size between the smallest and the largest")
        best = float(np.exp(self.centre - slope / (2 * bend)))
        if not self.sizes[0] <= best <= self.sizes[1]:
            raise NotIdentifiableError(f"the best size lies outside the grid, {'above' if best > self.sizes[1] else 'below'} all sizes")
        return best


@dataclass(frozen=True)
class Allocation:
    """The power law N* ~ C^exponent through the best sizes of the budgets."""

    exponent: float
    factor: float
    """N* = factor * C^exponent."""
    parabolas: list[Parabola]


def fit_law(grid: Grid, weights: Weights = "relative") -> Law:
    """Fit the joint law by variable projection. Raises NotIdentifiableError."""
    return _law(grid, _projection(grid, weights))


def law_quantities(grid: Grid, weights: Weights = "relative") -> tuple[Law, dict[str, Quantity]]:
    """Fit the joint law; return it and its parameters with 95 % intervals. `ratio` is the exponent of the best size over the budget.

    Raises NotIdentifiableError if the runs do not determine the law, including when every value of an exponent fits equally well.
    """
    projection = _projection(grid, weights)
    law, best = _law(grid, projection), projection.best
    allowed = allowed_squares(best.squares, len(grid), Law.DEGREES)
    found: dict[str, Quantity] = {}
    for name in ("alpha", "beta", "ratio", "E", "A", "B"):  # exponents first: if they are not identifiable, the rest is skipped
        low, high = {"E": (0.0, float(grid.loss.max())), "A": (1e-300, 1e300), "B": (1e-300, 1e300), "ratio": (0.001, 0.999)}.get(
            name, EXPONENT_BOUNDS
        )
        found[name] = profile_interval(
            partial(_profile, projection, name), getattr(law, name), allowed, low=low, high=high, log=name != "E"
        )
        if name in ("alpha", "beta") and found[name].low is None and found[name].high is None:
            raise NotIdentifiableError(f"any {name} from {EXPONENT_BOUNDS[0]} to {EXPONENT_BOUNDS[1]} fits as well")
    return law, found


def _profile(projection: Projection, name: Name) -> Callable[[float], float]:
    """A function that maps a fixed value of a parameter to the minimal sum of squares; each search starts from the previous result."""
    near = (projection.best.alpha, projection.best.beta)

    def squares(value: float) -> float:
        nonlocal near
        one = projection.minimum(near, FixedParameter(name, value))
        near = (one.alpha, one.beta)
        return one.squares

    return squares


def _law(grid: Grid, projection: Projection) -> Law:
    best = projection.best
    e, a, b = best.factors
    _check_bounds({"alpha": best.alpha, "beta": best.beta}, {"E": e})
    terms = projection.terms(best.alpha, best.beta)
    _check_term_range({"model size": a * terms[:, 1], "data": b * terms[:, 2]}, grid.loss)
    return Law.of(best, projection)


def _projection(grid: Grid, weights: Weights) -> Projection:
    _enough_for_a_law(grid)
    return Projection(grid.params, grid.tokens, grid.loss, weight_of(grid, weights))


def weight_of(grid: Grid, weights: Weights) -> np.ndarray:
    """The weights of the runs' errors, [M]."""
    return 1 / grid.loss if weights == "relative" else np.ones_like(grid.loss)


def _enough_for_a_law(grid: Grid) -> None:
    _check_count(grid.params, MIN_SIZES, "model sizes")
    _check_count(grid.tokens, MIN_AMOUNTS, "amounts of data")
    if len(grid) < (needed := Law.DEGREES + SPARE_RUNS):
        raise NotIdentifiableError(f"{len(grid)} runs, at least {needed} are needed for {Law.DEGREES} numbers")


def fit_law_huber(grid: Grid) -> Law:
    """Fit the joint law by Huber loss on log L, as Hoffmann et al. do; a cross-check. Raises NotIdentifiableError.

    Starts from the best points of a grid; SciPy's trust-region solver finds the same optimum as L-BFGS in a tenth of the time.
    """
    _enough_for_a_law(grid)
    n, d, target = _centred(grid.params), _centred(grid.tokens), np.log(grid.loss)

    def terms(x: np.ndarray) -> np.ndarray:
        """Logarithms of the law's terms [3, M], for x = (log E, log A, log B, alpha, beta)."""
        return np.stack([np.full_like(n, x[0]), x[1] - x[3] * n, x[2] - x[4] * d])

    def residuals(x: np.ndarray) -> np.ndarray:
        return (logsumexp(terms(x), axis=0) - target) / HUBER_DELTA

    def slopes(x: np.ndarray) -> np.ndarray:
        shares = softmax(terms(x), axis=0) / HUBER_DELTA
        return np.stack([*shares, -shares[1] * n, -shares[2] * d], 1)

    typical = target.mean()
    levels, exponents = (typical - 3, typical - 1), (0.1, 0.4, 1.0)
    grid_of_starts = product((typical - 1, typical), levels, levels, exponents, exponents)
    starts = sorted(map(np.array, grid_of_starts), key=lambda start: float(huber(1, residuals(start)).sum()))[:HUBER_STARTS]
    options: dict[str, Any] = {"loss": "huber", "ftol": 1e-12, "xtol": 1e-12, "gtol": 1e-12, "max_nfev": HUBER_EVALUATIONS}
    fits = [least_squares(residuals, start, jac=slopes, **options) for start in starts]
    x = min(fits, key=lambda found: found.cost).x
    scale_n, scale_d = np.log(grid.params).mean(), np.log(grid.tokens).mean()
    law = Law(
        E=float(np.exp(x[0])),
        A=float(np.exp(x[1] + x[3] * scale_n)),
        alpha=float(x[3]),
        B=float(np.exp(x[2] + x[4] * scale_d)),
        beta=float(x[4]),
    )
    _check_bounds({"alpha": law.alpha, "beta": law.beta}, {"E": law.E})
    return law


def fit_data_law(grid: Grid, weights: Weights = "relative") -> DataLaw:
    """Fit loss over data for each size, with one exponent for all sizes. Raises NotIdentifiableError."""
    return data_law_quantities(grid, weights)[0]


def data_law_quantities(grid: Grid, weights: Weights = "relative") -> tuple[DataLaw, dict[str, Quantity]]:
    """Fit loss over data for each size; return the law, and its exponent `beta` with a 95 % interval. Raises NotIdentifiableError.

    All sizes share the exponent, so one size with `MIN_AMOUNTS` amounts of data determines it for sizes with only two.
    """
    sizes, which = np.unique(grid.params, return_inverse=True)
    amounts = [len(np.unique(grid.tokens[which == number])) for number in range(len(sizes))]
    if max(amounts) < MIN_AMOUNTS:
        raise NotIdentifiableError(f"{max(amounts)} amounts of data at a model size, at least {MIN_AMOUNTS} are needed at one")
    if min(amounts) < 2:
        raise NotIdentifiableError("1 amount of data at a model size, at least 2 are needed at each")
    scale, weight = float(np.log(grid.tokens).mean()), weight_of(grid, weights)
    d = np.log(grid.tokens) - scale

    def solve(beta: float) -> tuple[np.ndarray, float]:
        """E and B of each size [S, 2], and the sum of squares."""
        factors, squares = np.empty((len(sizes), 2)), 0.0
        for number in range(len(sizes)):
            here = which == number
            columns = np.stack([np.ones(here.sum()), np.exp(-beta * d[here])], 1) * weight[here, None]
            factors[number], left = nnls(columns, grid.loss[here] * weight[here])
            squares += left**2
        return factors, squares

    coarse = [solve(beta)[1] for beta in EXPONENT_GRID]
    best = int(np.argmin(coarse))
    edges = np.log([EXPONENT_BOUNDS[0], *EXPONENT_GRID, EXPONENT_BOUNDS[1]])
    options = {"xatol": 1e-10}
    found = minimize_scalar(lambda x: solve(float(np.exp(x)))[1], bounds=(edges[best], edges[best + 2]), method="bounded", options=options)
    beta = float(np.exp(found.x))
    factors, squares = solve(beta)
    e, b = factors.T
    _check_bounds({"beta": beta}, {f"E at {size:.3g} parameters": value for size, value in zip(sizes, e, strict=True)})
    _check_term_range({"data": b[which] * np.exp(-beta * d)}, grid.loss)
    law = DataLaw(beta, sizes, e, b * np.exp(beta * scale))
    if len(grid) <= law.degrees:
        return law, {"beta": Quantity(value=beta, reason="no interval: as many numbers as runs")}
    allowed = allowed_squares(squares, len(grid), law.degrees)
    low, high = EXPONENT_BOUNDS
    return law, {"beta": profile_interval(lambda: lambda value: solve(value)[1], beta, allowed, low=low, high=high, log=True)}


def fit_parabola(grid: Grid, budget: float) -> Parabola:
    """Fit the IsoFLOP curve of one budget. Raises NotIdentifiableError for fewer than three sizes."""
    here = grid.take(np.flatnonzero(grid.budget == budget))
    _check_count(here.params, 3, "model sizes at this budget")
    x = np.log(here.params)
    curve = np.poly1d(np.polyfit(x - x.mean(), here.loss, 2))
    return Parabola(float(budget), curve, float(x.mean()), (float(here.params.min()), float(here.params.max())))


def fit_allocation(grid: Grid) -> Allocation:
    """Fit the power law through the best sizes of the budgets. Raises NotIdentifiableError for fewer than three of them."""
    parabolas, best = [], []
    for budget in np.unique(grid.budget):
        try:
            parabolas.append(fit_parabola(grid, budget))
            best.append((np.log(budget), np.log(parabolas[-1].optimum())))
        except NotIdentifiableError:
            continue
    if len(best) < MIN_VERTICES:
        raise NotIdentifiableError(f"{len(best)} budgets have a best size inside the grid, at least {MIN_VERTICES} are needed")
    log_budgets, log_sizes = np.array(best).T
    slope, offset = np.polyfit(log_budgets, log_sizes, 1)
    return Allocation(float(slope), float(np.exp(offset)), parabolas)


def crossover(budgets: Sequence[float], difference: Sequence[float]) -> float:
    """The budget at which the difference between two variants changes its sign, interpolated in log C.

    Raises NotIdentifiableError if it never does, or does more than once.
    """
    if len(budgets) < 2:
        raise NotIdentifiableError("fewer than two budgets have runs of both variants")
    changes = [i for i in range(len(budgets) - 1) if difference[i] * difference[i + 1] < 0]
    if not changes:
        better = "foveated" if difference[-1] < 0 else "baseline"
        raise NotIdentifiableError(f"no crossover in the range tried: at its end the {better} is better, and no sign change before")
    if len(changes) > 1:
        raise NotIdentifiableError(f"the better variant changes {len(changes)} times: the difference is within the noise")
    (i,) = changes
    share = difference[i] / (difference[i] - difference[i + 1])
    return float(np.exp(np.log(budgets[i]) + share * (np.log(budgets[i + 1]) - np.log(budgets[i]))))


def _centred(values: np.ndarray) -> np.ndarray:
    """Centred logarithms, which keep the factors on the scale of the loss."""
    logarithms = np.log(values)
    return logarithms - logarithms.mean()


def _check_count(values: np.ndarray, wanted: int, what: str) -> None:
    if (distinct := len(np.unique(values))) < wanted:
        raise NotIdentifiableError(f"{distinct} {what}, at least {wanted} are needed")


def _check_bounds(exponents: dict[str, float], offsets: dict[str, float]) -> None:
    low, high = EXPONENT_BOUNDS
    for name, value in exponents.items():
        if not low * BOUND_MARGIN < value < high / BOUND_MARGIN:
            raise NotIdentifiableError(f"{name} hit the bound of its search range {low} to {high}")
    for name, value in offsets.items():
        if value <= 1e-9:
            raise NotIdentifiableError(f"{name} hit its bound 0: the losses are too far from their floor to show it")


def _check_term_range(terms: dict[str, np.ndarray], loss: np.ndarray) -> None:
    for name, values in terms.items():
        if np.ptp(values) < MIN_TERM_SHARE * np.ptp(loss):
            raise NotIdentifiableError(f"the losses hardly depend on {name}: its term spans under {MIN_TERM_SHARE:.0%} of their range")
