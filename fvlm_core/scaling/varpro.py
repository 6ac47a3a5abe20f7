"""Variable projection for L(N, D) = E + A / N^alpha + B / D^beta: a search over the exponents, with the factors solved for exactly.

For given exponents, the law is linear in E, A and B, which are constrained to be non-negative (Golub and Pereyra 1973; recommended for
scaling laws by Czech et al. 2026, https://arxiv.org/abs/2603.22339). The search therefore has two dimensions instead of five: a grid of
exponents provides starting points, and Levenberg-Marquardt refines them. Any one parameter can be held fixed, as profile intervals need.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from scipy.optimize import leastsq, nnls

EXPONENT_BOUNDS = (0.02, 3.0)
"""Search range of the exponents; an optimum at a bound does not count as a fit."""
LOG_LOW, LOG_SPAN = float(np.log(EXPONENT_BOUNDS[0])), float(np.log(EXPONENT_BOUNDS[1] / EXPONENT_BOUNDS[0]))
EXPONENT_GRID = np.geomspace(*EXPONENT_BOUNDS, 17)[1:-1]
MIDDLE = (0.1, 0.35, 1.2)
"""Additional starts after a search that ended at a bound, where the objective is too flat to return from."""
BOUND_MARGIN = 1.02
"""An exponent within this factor of a bound counts as having hit it."""
INSIDE = 1e-4
"""Minimum distance of starts from the bounds, as a share of the log range."""
TOLERANCE = 1e-14
MOST_EVALUATIONS = 400

Name = Literal["E", "A", "alpha", "B", "beta", "ratio"]
"""`ratio` is beta / (alpha + beta), the exponent of the best size over the budget."""
FACTORS = {"E": 0, "A": 1, "B": 2}


@dataclass(frozen=True)
class FixedParameter:
    """A parameter of the law that is held at a fixed value."""

    name: Name
    value: float


@dataclass(frozen=True)
class Minimum:
    """A minimum of the sum of squares."""

    alpha: float
    beta: float
    factors: np.ndarray
    """[3]: E, and the size and data terms at the mean log N and mean log D."""
    squares: float
    """Sum of squared weighted residuals."""


class Projection:
    """The least-squares problem for one set of M runs."""

    def __init__(self, params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, weight: np.ndarray) -> None:
        """All arrays are [M]; residuals are (law - loss) * weight."""
        self.scale_n, self.scale_d = float(np.log(params).mean()), float(np.log(tokens).mean())
        self.n, self.d = np.log(params) - self.scale_n, np.log(tokens) - self.scale_d  # centred: keeps factors on the scale of the loss
        self.weight, self.target = weight, loss * weight

    def with_loss(self, loss: np.ndarray) -> "Projection":
        """The same runs with other losses [M], for resampling."""
        other = object.__new__(Projection)
        other.scale_n, other.scale_d, other.n, other.d, other.weight = self.scale_n, self.scale_d, self.n, self.d, self.weight
        other.target = loss * self.weight
        return other

    def terms(self, alpha: float, beta: float) -> np.ndarray:
        """Design matrix [M, 3] of the linear factors, at the centred logarithms."""
        return np.stack([np.ones_like(self.n), np.exp(-alpha * self.n), np.exp(-beta * self.d)], 1)

    def solve(self, alpha: float, beta: float, held: FixedParameter | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Optimal factors [3] and weighted residuals [M] for given exponents."""
        columns = self.terms(alpha, beta) * self.weight[:, None]
        if held is None or held.name not in FACTORS:
            factors, _ = nnls(columns, self.target)
            return factors, columns @ factors - self.target
        place, value = FACTORS[held.name], held.value
        value *= {"E": 1.0, "A": np.exp(-alpha * self.scale_n), "B": np.exp(-beta * self.scale_d)}[held.name]
        others = [column for column in range(3) if column != place]
        factors = np.full(3, value)
        factors[others], _ = nnls(columns[:, others], self.target - value * columns[:, place])
        return factors, columns @ factors - self.target

    def slopes(self, alpha: float, beta: float, held: FixedParameter | None = None) -> np.ndarray:
        """Jacobian [M, 2] of the weighted residuals with respect to alpha and beta, with the factors re-optimised (Kaufman 1975): the
        component in the span of the free factors' columns is projected out."""
        factors, _ = self.solve(alpha, beta, held)
        terms, fixed = self.terms(alpha, beta), None if held is None else FACTORS.get(held.name)
        # a held A or B is fixed at uncentred logarithms, so its centred value depends on the exponent; for a free one, centring cancels
        by_n, by_d = (self.n + (self.scale_n if fixed == 1 else 0), self.d + (self.scale_d if fixed == 2 else 0))
        found = -np.stack([factors[1] * by_n * terms[:, 1], factors[2] * by_d * terms[:, 2]], 1) * self.weight[:, None]
        free = [column for column in range(3) if column != fixed and factors[column] > 0]
        spanned, _ = np.linalg.qr(terms[:, free] * self.weight[:, None])
        return found - spanned @ (spanned.T @ found)

    def minimum(self, start: tuple[float, float], held: FixedParameter | None = None) -> Minimum:
        """The local minimum reached from `start` (alpha, beta)."""
        free = _free(held)
        of_alpha = held.value / (1 - held.value) if held is not None and held.name == "ratio" else None

        def exponents(x: np.ndarray) -> tuple[float, float]:
            found = {name: _bounded(value) for name, value in zip(free, x, strict=True)}
            if of_alpha is not None:
                return found["alpha"], float(np.clip(found["alpha"] * of_alpha, *EXPONENT_BOUNDS))
            fixed = {held.name: held.value} if held is not None else {}
            return (found | fixed)["alpha"], (found | fixed)["beta"]

        def residuals(x: np.ndarray) -> np.ndarray:
            return self.solve(*exponents(x), held)[1]

        def jacobian(x: np.ndarray) -> np.ndarray:
            alpha, beta = exponents(x)
            slopes = self.slopes(alpha, beta, held)
            if of_alpha is not None:
                slopes = slopes @ np.array([[1.0], [of_alpha]])
            else:
                slopes = slopes[:, [("alpha", "beta").index(name) for name in free]]
            return slopes * np.array([_bounded_slope(value) for value in x])

        first = np.array([_unbounded({"alpha": start[0], "beta": start[1]}[name]) for name in free])
        x = leastsq(residuals, first, Dfun=jacobian, ftol=TOLERANCE, xtol=1e-12, gtol=0.0, maxfev=MOST_EVALUATIONS, full_output=True)[0]
        alpha, beta = exponents(np.atleast_1d(x))
        factors, left = self.solve(alpha, beta, held)
        return Minimum(alpha, beta, factors, float(left @ left))

    @cached_property
    def best(self) -> Minimum:
        """The best minimum found from the starts on the grid, plus `MIDDLE` for an exponent that ended at a bound."""
        best = min((self.minimum(start) for start in self._starts()), key=lambda one: one.squares)
        if _at_bound(best.alpha):
            best = min((best, *(self.minimum((alpha, best.beta)) for alpha in MIDDLE)), key=lambda one: one.squares)
        if _at_bound(best.beta):
            best = min((best, *(self.minimum((best.alpha, beta)) for beta in MIDDLE)), key=lambda one: one.squares)
        return best

    def _starts(self) -> list[tuple[float, float]]:
        """Local minima of the sum of squares over a grid of exponents, lowest first, at most three."""
        surface = self._surface()
        around = np.pad(surface, 1, constant_values=np.inf)
        rows, columns = surface.shape
        shifts = [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
        lowest = np.all([surface <= around[i : i + rows, j : j + columns] for i, j in shifts], axis=0)
        places = sorted(np.argwhere(lowest).tolist(), key=lambda place: surface[place[0], place[1]])
        return [(float(EXPONENT_GRID[i]), float(EXPONENT_GRID[j])) for i, j in places[:3]]

    def _surface(self) -> np.ndarray:
        """Sum of squares [I, J] for all pairs of grid exponents. Normal equations would be faster, but lose the digits of small terms."""
        return np.array([[np.square(self.solve(alpha, beta)[1]).sum() for beta in EXPONENT_GRID] for alpha in EXPONENT_GRID])


def _at_bound(exponent: float) -> bool:
    return not EXPONENT_BOUNDS[0] * BOUND_MARGIN < exponent < EXPONENT_BOUNDS[1] / BOUND_MARGIN


def _free(held: FixedParameter | None) -> list[str]:
    """Names of the exponents that are searched."""
    if held is not None and held.name == "ratio":
        return ["alpha"]
    return [name for name in ("alpha", "beta") if held is None or held.name != name]


def _bounded(value: float) -> float:
    """Map any real number to an exponent within the bounds (sigmoid on a log scale)."""
    return float(np.exp(LOG_LOW + LOG_SPAN / (1 + np.exp(-np.clip(value, -50, 50)))))


def _bounded_slope(value: float) -> float:
    """Derivative of `_bounded`."""
    share = 1 / (1 + np.exp(-np.clip(value, -50, 50)))
    return _bounded(value) * LOG_SPAN * float(share * (1 - share))


def _unbounded(exponent: float) -> float:
    share = np.clip((np.log(exponent) - LOG_LOW) / LOG_SPAN, INSIDE, 1 - INSIDE)
    return float(np.log(share / (1 - share)))
