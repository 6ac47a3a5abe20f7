"""95 % profile intervals of a law's parameters: how far a parameter can move, with all others refitted, before the fit becomes
significantly worse.

The threshold is that of an F test: squares(value) <= squares(best) * (1 + F(1, M - p) / (M - p)), with M runs and p fitted parameters
(Bates and Watts 1988, Nonlinear Regression Analysis, ch. 6). Nominal 95 % bootstrap intervals over runs cover the true value in 88 % of
simulations; these intervals have their nominal coverage (`python -m benchmarks.scaling_coverage`) and depend on no seed. If the fit never
becomes significantly worse in one direction, the interval is open on that side, and the result says so.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from scipy.optimize import brentq
from scipy.stats import f as f_distribution

from fvlm_core.scaling.jobs import Quantity

CONFIDENCE = 0.95
NOISE_FLOOR = 1e-9
"""Lower bound on the standard deviation of the weighted residuals, so that rounding errors do not pass for precision."""
FIRST_STEP = 1e-3


def allowed_squares(squares: float, runs: int, degrees: int) -> float:
    """The largest sum of squares that is not significantly worse than the best one, for `degrees` fitted parameters."""
    left = runs - degrees
    best = max(squares, left * NOISE_FLOOR**2)
    return best * (1 + float(f_distribution.ppf(CONFIDENCE, 1, left)) / left)


def profile_interval(
    profile: Callable[[], Callable[[float], float]], value: float, allowed: float, *, low: float, high: float, log: bool
) -> Quantity:
    """The value with its profile interval, searched from `low` to `high`; on a log scale if `log`.

    `profile` returns a function that maps a fixed value of the parameter to the minimal sum of squares. It is called once per side, and the
    returned function is called with values that move away from `value`, so each minimisation may start from the previous result.
    """
    ends = [_end(profile(), value, allowed, sign, bound, log=log) for sign, bound in ((-1, low), (1, high))]
    reasons = {0: f"no lower end: anything down to {low:.3g} fits as well", 1: f"no upper end: anything up to {high:.3g} fits as well"}
    return Quantity(
        value=value, low=ends[0], high=ends[1], reason="; ".join(reason for side, reason in reasons.items() if ends[side] is None)
    )


def _end(profile: Callable[[float], float], value: float, allowed: float, sign: int, bound: float, *, log: bool) -> float | None:
    """The point between `value` and `bound` at which the sum of squares exceeds `allowed`; None if there is none."""
    to, back = (np.log, np.exp) if log else (float, float)

    @cache  # a warm-started minimisation is not deterministic in its argument, and brentq needs consistent signs
    def excess(place: float) -> float:
        return profile(float(back(place))) - allowed

    centre, limit, step = float(to(value)), float(to(bound)), FIRST_STEP * (1.0 if log else max(abs(value), 1e-3))
    inside = centre
    if excess(inside) >= 0:
        return value  # only rounding errors: the fit has no noise
    while inside != limit:
        outside = centre + sign * step
        outside = max(outside, limit) if sign < 0 else min(outside, limit)
        if excess(outside) > 0:
            crossing = brentq(excess, inside, outside, xtol=1e-4 * abs(outside - centre))
            return float(back(float(crossing)))
        inside, step = outside, 2 * step
    return None
