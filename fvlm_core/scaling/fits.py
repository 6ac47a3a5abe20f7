"""Scaling laws of a grid of runs: what can be fitted is fitted, with an interval; what cannot is said plainly.

The joint law is L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556). For given
exponents it is linear, so they are searched and E, A, B solved for exactly, non-negative (variable projection, which Czech et al.
2026, https://arxiv.org/abs/2603.22339, recommend over parabolas). The original's own way, Huber loss on logarithms with
L-BFGS, is the cross-check; it sums and tightens tolerances, since the original stopped early (Besiroglu et al. 2024,
https://arxiv.org/abs/2404.10102). IsoFLOP parabolas give the best size per budget without any law.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol, TypeVar

import numpy as np
from scipy.optimize import least_squares, minimize, nnls
from scipy.special import logsumexp

from fvlm_core.scaling.jobs import Quantity

EXPONENT_BOUNDS = (0.02, 3.0)
"""Searched range of exponents; an optimum at its edge is no finding."""
BOUND_MARGIN = 1.02
"""An exponent within this factor of a bound has hit it."""
EXPONENT_GRID = np.geomspace(*EXPONENT_BOUNDS, 13)
MIN_SIZES = MIN_BUDGETS = 4
"""Distinct values that an exponent takes: with three, E, a factor and an exponent fit anything."""
MIN_TERM_SHARE = 0.01
"""A term that varies by less than this share of the losses' range says nothing about its exponent."""
HUBER_DELTA = 1e-3
USABLE_SHARE = 0.8
"""Of the resamples must identify a number for it to get an interval."""
MIN_VERTICES = 3
"""Budgets with a best size inside the grid, for a power law through them."""


class NotIdentifiableError(ValueError):
    """The points do not determine the law; says why."""


@dataclass(frozen=True)
class Grid:
    """Runs as arrays of equal length."""

    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    budget: np.ndarray
    """Nominal training FLOPs."""

    def take(self, index: np.ndarray) -> "Grid":
        return Grid(self.params[index], self.tokens[index], self.loss[index], self.budget[index])

    def __len__(self) -> int:
        return len(self.loss)


class Fitted(Protocol):
    """What an interval can be put around."""

    @property
    def degrees(self) -> int:
        """Fitted numbers."""
        ...

    def numbers(self) -> dict[str, float]:
        """Those that are reported."""
        ...

    def predict(self, grid: Grid) -> np.ndarray:
        """Predicted loss of the grid's runs, in nats per labelled token."""
        ...


Fit = TypeVar("Fit", bound=Fitted)


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    @property
    def degrees(self) -> int:
        return 5

    def numbers(self) -> dict[str, float]:
        return {"E": self.E, "A": self.A, "alpha": self.alpha, "B": self.B, "beta": self.beta}

    def predict(self, grid: Grid) -> np.ndarray:
        return self.loss(grid.params, grid.tokens)

    def loss(self, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Predicted loss of any sizes and amounts of data."""
        return self.E + self.A * np.power(params, -self.alpha) + self.B * np.power(tokens, -self.beta)


@dataclass(frozen=True)
class DataLaw:
    """Per size L = E + B / D^beta, with one exponent for all sizes."""

    beta: float
    sizes: np.ndarray
    """Parameters, ascending."""
    E: np.ndarray
    B: np.ndarray

    @property
    def degrees(self) -> int:
        return 1 + 2 * len(self.sizes)

    def numbers(self) -> dict[str, float]:
        return {"beta": self.beta}

    def predict(self, grid: Grid) -> np.ndarray:
        return self.loss(grid.params, grid.tokens)

    def loss(self, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Predicted loss of fitted sizes and any amounts of data."""
        which = np.searchsorted(self.sizes, params)
        return self.E[which] + self.B[which] * np.power(tokens, -self.beta)


@dataclass(frozen=True)
class Parabola:
    """One budget's losses over log N."""

    budget: float
    curve: np.poly1d
    """Loss over log N minus `centre`."""
    centre: float
    sizes: tuple[float, float]
    """Smallest and largest N tried."""

    def loss(self, params: np.ndarray) -> np.ndarray:
        """Predicted loss of sizes at this budget."""
        return self.curve(np.log(params) - self.centre)

    def optimum(self) -> float:
        """The best size, in parameters. Raises NotIdentifiableError where the grid does not enclose one."""
        bend, slope = self.curve[2], self.curve[1]  # by power: poly1d drops leading zeros
        if bend <= 0:
            raise NotIdentifiableError("the losses do not bend upwards: no best size between the smallest and the largest")
        best = float(np.exp(self.centre - slope / (2 * bend)))
        if not self.sizes[0] <= best <= self.sizes[1]:
            raise NotIdentifiableError(f"the best size lies outside the grid, {'above' if best > self.sizes[1] else 'below'} all sizes")
        return best


@dataclass(frozen=True)
class Allocation:
    """N* ~ C^exponent through the best sizes of the budgets."""

    exponent: float
    factor: float
    """N* = factor * C^exponent."""
    parabolas: list[Parabola]

    @property
    def degrees(self) -> int:
        return 3 * len(self.parabolas)

    def numbers(self) -> dict[str, float]:
        return {"exponent": self.exponent}

    def predict(self, grid: Grid) -> np.ndarray:
        predicted = np.empty_like(grid.loss)
        for parabola in self.parabolas:
            here = grid.budget == parabola.budget
            predicted[here] = parabola.loss(grid.params[here])
        return predicted


def fit_law(grid: Grid) -> Law:
    """The joint law by variable projection, on relative errors. Raises NotIdentifiableError."""
    _enough(grid.params, MIN_SIZES, "model sizes")
    _enough(grid.budget, MIN_BUDGETS, "budgets")
    n, d = _centred(grid.params), _centred(grid.tokens)

    def basis(exponents: np.ndarray) -> np.ndarray:
        return np.stack([np.ones_like(n), np.exp(-exponents[0] * n), np.exp(-exponents[1] * d)], 1)

    (alpha, beta), (e, a, b) = _variable_projection(basis, grid.loss, 2)
    _inside({"alpha": alpha, "beta": beta}, {"E": e})
    _matters({"model size": a * np.exp(-alpha * n), "data": b * np.exp(-beta * d)}, grid.loss)
    scale_n, scale_d = np.log(grid.params).mean(), np.log(grid.tokens).mean()
    return Law(float(e), float(a * np.exp(alpha * scale_n)), float(alpha), float(b * np.exp(beta * scale_d)), float(beta))


def fit_law_huber(grid: Grid) -> Law:
    """The joint law by Huber loss on log L, L-BFGS from a grid of starts: the cross-check. Raises NotIdentifiableError."""
    _enough(grid.params, MIN_SIZES, "model sizes")
    _enough(grid.budget, MIN_BUDGETS, "budgets")
    n, d, target = _centred(grid.params), _centred(grid.tokens), np.log(grid.loss)

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        """Summed Huber loss of x = (log E, log A, log B, alpha, beta), and its gradient."""
        terms = np.stack([np.full_like(n, x[0]), x[1] - x[3] * n, x[2] - x[4] * d])
        predicted = logsumexp(terms, axis=0)
        error = predicted - target
        small = np.abs(error) <= HUBER_DELTA
        value = np.where(small, error**2 / 2, HUBER_DELTA * (np.abs(error) - HUBER_DELTA / 2))
        slope = np.clip(error, -HUBER_DELTA, HUBER_DELTA)
        shares = np.exp(terms - predicted) * slope
        gradient = np.array([shares[0].sum(), shares[1].sum(), shares[2].sum(), -(shares[1] * n).sum(), -(shares[2] * d).sum()])
        # Huber's delta makes values ~1e-6: scaled up so that the tolerances below mean something
        return float(value.sum()) / HUBER_DELTA**2, gradient / HUBER_DELTA**2

    typical = target.mean()
    starts = product((typical - 1, typical), (typical - 3, typical - 1), (typical - 3, typical - 1), (0.1, 0.4, 1.0), (0.1, 0.4, 1.0))
    options = {"ftol": 1e-14, "gtol": 1e-9, "maxiter": 5000, "maxcor": 30}
    found = [minimize(objective, np.array(start), jac=True, method="L-BFGS-B", options=options) for start in starts]
    x = min(found, key=lambda result: result.fun).x
    scale_n, scale_d = np.log(grid.params).mean(), np.log(grid.tokens).mean()
    law = Law(*(float(v) for v in (np.exp(x[0]), np.exp(x[1] + x[3] * scale_n), x[3], np.exp(x[2] + x[4] * scale_d), x[4])))
    _inside({"alpha": law.alpha, "beta": law.beta}, {"E": law.E})
    return law


def fit_data_law(grid: Grid) -> DataLaw:
    """Loss against data with one exponent for all sizes. Raises NotIdentifiableError."""
    sizes, which = np.unique(grid.params, return_inverse=True)
    for number in range(len(sizes)):
        _enough(grid.budget[which == number], MIN_BUDGETS, "budgets at every model size")
    d, member = _centred(grid.tokens), np.eye(len(sizes))[which]

    def basis(exponents: np.ndarray) -> np.ndarray:
        return np.concatenate([member, member * np.exp(-exponents[0] * d)[:, None]], 1)

    (beta,), factors = _variable_projection(basis, grid.loss, 1)
    e, b = np.split(factors, 2)
    _inside({"beta": beta}, {f"E at {size:.3g} parameters": value for size, value in zip(sizes, e, strict=True)})
    _matters({"data": (member @ b) * np.exp(-beta * d)}, grid.loss)
    return DataLaw(float(beta), sizes, e, b * np.exp(beta * np.log(grid.tokens).mean()))


def fit_parabola(grid: Grid, budget: float) -> Parabola:
    """The IsoFLOP curve of one budget. Raises NotIdentifiableError for fewer than three sizes."""
    here = grid.take(np.flatnonzero(grid.budget == budget))
    _enough(here.params, 3, "model sizes at this budget")
    x = np.log(here.params)
    curve = np.poly1d(np.polyfit(x - x.mean(), here.loss, 2))
    return Parabola(float(budget), curve, float(x.mean()), (float(here.params.min()), float(here.params.max())))


def fit_allocation(grid: Grid) -> Allocation:
    """The power law through the budgets' best sizes. Raises NotIdentifiableError for fewer than three of them."""
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
    """The budget at which a difference between two variants changes its sign, interpolated in log C.

    Raises NotIdentifiableError where it never does, or more than once.
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


def quantities(grid: Grid, fit: Callable[[Grid], Fit], *, resamples: int, seed: int) -> tuple[Fit, dict[str, Quantity]]:
    """A fit, and its numbers with 95 % intervals: percentiles over resamples of the runs, drawn with replacement.

    Where too few of those still identify the numbers (a grid with the fewest runs that a fit takes), the runs' relative
    residuals are resampled instead, scaled up for the fit's degrees of freedom; `Quantity.reason` says so. Raises
    NotIdentifiableError where the grid itself does not identify them.
    """
    fitted = fit(grid)
    numbers = fitted.numbers()
    rng = np.random.default_rng(seed)
    drawn = _identified(fit, (grid.take(rng.integers(len(grid), size=len(grid))) for _ in range(resamples)))
    reason = ""
    if len(drawn) < USABLE_SHARE * resamples:
        reason = f"interval from residuals: only {len(drawn)} of {resamples} resamples of the runs identify it"
        predicted = fitted.predict(grid)
        if len(grid) <= fitted.degrees:
            return fitted, {name: Quantity(value=value, reason="no interval: as many numbers as runs") for name, value in numbers.items()}
        residuals = (grid.loss / predicted - 1) * np.sqrt(len(grid) / (len(grid) - fitted.degrees))
        noise = (rng.choice(residuals, len(grid)) for _ in range(resamples))
        drawn = _identified(fit, (replace(grid, loss=predicted * (1 + one)) for one in noise))
    if len(drawn) < USABLE_SHARE * resamples:
        reason = f"no interval: only {len(drawn)} of {resamples} resamples identify it"
        return fitted, {name: Quantity(value=value, reason=reason) for name, value in numbers.items()}
    intervals = {name: np.percentile([one[name] for one in drawn], [2.5, 97.5]) for name in numbers}
    return fitted, {
        name: Quantity(value=numbers[name], low=float(low), high=float(high), reason=reason) for name, (low, high) in intervals.items()
    }


def _identified(fit: Callable[[Grid], Fitted], grids: Iterable[Grid]) -> list[dict[str, float]]:
    """The numbers of the grids that identify them."""
    found = []
    for grid in grids:
        try:
            found.append(fit(grid).numbers())
        except NotIdentifiableError:
            continue
    return found


def _variable_projection(basis: Callable[[np.ndarray], np.ndarray], loss: np.ndarray, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Exponents, and non-negative factors of `basis(exponents)` [M, K], that fit `loss` [M] best in relative error."""

    def solve(exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        matrix = basis(exponents) / loss[:, None]
        factors, _ = nnls(matrix, np.ones_like(loss))
        return factors, matrix @ factors - 1

    def residuals(logarithms: np.ndarray) -> np.ndarray:
        return solve(np.exp(logarithms))[1]

    coarse = sorted((np.array(point) for point in product(EXPONENT_GRID, repeat=dimensions)), key=lambda p: float((solve(p)[1] ** 2).sum()))
    bounds = tuple(np.full(dimensions, np.log(bound)) for bound in EXPONENT_BOUNDS)
    inside = np.clip(np.log(coarse[0]), bounds[0] + 1e-6, bounds[1] - 1e-6)
    found = least_squares(residuals, inside, bounds=bounds, jac="3-point", ftol=1e-15, xtol=1e-15, gtol=1e-15)
    exponents = np.exp(found.x)
    return exponents, solve(exponents)[0]


def _centred(values: np.ndarray) -> np.ndarray:
    """log of values, minus its mean: keeps the factors on the scale of the loss."""
    logarithms = np.log(values)
    return logarithms - logarithms.mean()


def _enough(values: np.ndarray, wanted: int, what: str) -> None:
    if (distinct := len(np.unique(values))) < wanted:
        raise NotIdentifiableError(f"{distinct} {what}, at least {wanted} are needed")


def _inside(exponents: dict[str, float], offsets: dict[str, float]) -> None:
    low, high = EXPONENT_BOUNDS
    for name, value in exponents.items():
        if not low * BOUND_MARGIN < value < high / BOUND_MARGIN:
            raise NotIdentifiableError(f"{name} hit the bound of its search range {low} to {high}")
    for name, value in offsets.items():
        if value <= 1e-9:
            raise NotIdentifiableError(f"{name} hit its bound 0: the losses are too far from their floor to show it")


def _matters(terms: dict[str, np.ndarray], loss: np.ndarray) -> None:
    for name, values in terms.items():
        if np.ptp(values) < MIN_TERM_SHARE * np.ptp(loss):
            raise NotIdentifiableError(f"the losses hardly depend on {name}: its term spans under {MIN_TERM_SHARE:.0%} of their range")
