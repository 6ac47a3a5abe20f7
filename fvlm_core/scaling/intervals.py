"""95 % intervals of a law's numbers by profiles: how far a number can be moved, with all others fitted anew, before the fit is worse than
noise explains.

The bound is an F test's: squares(value) <= squares(best) * (1 + F(1, M - p) / (M - p)), with M runs and p fitted numbers (Bates and Watts
1988, Nonlinear Regression Analysis, ch. 6). Resampling runs covers the truth in 88 % where it says 95 %; these cover it as often as they
say (`python -m benchmarks.scaling_coverage` shows it by simulation). They depend on no seed. A side that never becomes worse is open, which
is said in place of a bound.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from scipy.optimize import brentq
from scipy.stats import f as f_distribution

from fvlm_core.scaling.jobs import Quantity

CONFIDENCE = 0.95
NOISE_FLOOR = 1e-9
"""Of the weighted residuals: rounding is not taken for precision."""
FIRST_STEP = 1e-3


def allowed_squares(squares: float, runs: int, degrees: int) -> float:
    """The sum of squares up to which a fit is as good as the best, within the confidence."""
    left = runs - degrees
    best = max(squares, left * NOISE_FLOOR**2)
    return best * (1 + float(f_distribution.ppf(CONFIDENCE, 1, left)) / left)


def profile_interval(
    profile: Callable[[], Callable[[float], float]], value: float, allowed: float, *, low: float, high: float, log: bool
) -> Quantity:
    """The number with its interval; it is searched from `low` to `high`, in logarithms where `log`.

    `profile` makes a function value -> sum of squares with the number held there; one is made per side, and called on a walk away from
    `value`, so it may start each search where the last one ended.
    """
    ends = [_end(profile(), value, allowed, sign, bound, log=log) for sign, bound in ((-1, low), (1, high))]
    reasons = {0: f"no lower end: anything down to {low:.3g} fits as well", 1: f"no upper end: anything up to {high:.3g} fits as well"}
    return Quantity(
        value=value, low=ends[0], high=ends[1], reason="; ".join(reason for side, reason in reasons.items() if ends[side] is None)
    )


def _end(profile: Callable[[float], float], value: float, allowed: float, sign: int, bound: float, *, log: bool) -> float | None:
    """Where the sum of squares passes what is allowed, on the way from `value` to `bound`; None where it does not."""
    to, back = (np.log, np.exp) if log else (float, float)

    @cache  # a search that starts where the last one ended may find another value at the same place: signs must not change
    def excess(place: float) -> float:
        return profile(float(back(place))) - allowed

    centre, limit, step = float(to(value)), float(to(bound)), FIRST_STEP * (1.0 if log else max(abs(value), 1e-3))
    inside = centre
    if excess(inside) >= 0:
        return value  # rounding: the fit has no noise
    while inside != limit:
        outside = centre + sign * step
        outside = max(outside, limit) if sign < 0 else min(outside, limit)
        if excess(outside) > 0:
            crossing = brentq(excess, inside, outside, xtol=1e-4 * abs(outside - centre))
            return float(back(float(crossing)))
        inside, step = outside, 2 * step
    return None
