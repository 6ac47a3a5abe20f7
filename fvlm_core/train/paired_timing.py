"""Compare the speed of two variants by interleaved steps, with a confidence interval of the median ratio.

Steps alternate A, B, A, B, so that drifts of the machine affect both alike, and step i of both trains on the same samples. The interval
uses order statistics and makes no assumption about the distribution of step times.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from scipy.stats import binom

CONFIDENCE = 0.95
MIN_PAIRS = 6
"""Fewest pairs for which a 95 % interval exists."""
HALVINGS = 2
"""Number of bisections between a size that fits and one that does not, in `largest_that_fits`."""


@dataclass(frozen=True)
class Ratio:
    """Speed of B relative to A: the median over pairs of steps, with its confidence interval."""

    value: float
    low: float
    high: float
    pairs: int


def ratio_of(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """Compute B's speed relative to A's from the seconds of paired steps. With fewer than `MIN_PAIRS` pairs, the interval is unbounded."""
    ratios = sorted(a / b for a, b in zip(first, second, strict=True))
    n = len(ratios)
    if n < MIN_PAIRS:
        return Ratio(median(ratios), 0.0, math.inf, n)
    tail = int(binom.ppf((1 - CONFIDENCE) / 2, n, 0.5))  # the largest k with P(fewer than k below the median) <= 2.5 %
    return Ratio(median(ratios), ratios[max(0, tail - 1)], ratios[min(n - 1, n - tail)], n)


def alternate(first: Callable[[], float], second: Callable[[], float], *, pairs: int, max_s: float) -> tuple[list[float], list[float]]:
    """Run pairs of steps and return the seconds of both. Stops early after `max_s` seconds, but not before `MIN_PAIRS` pairs."""
    a: list[float] = []
    b: list[float] = []
    while len(a) < pairs and (len(a) < MIN_PAIRS or sum(a) + sum(b) < max_s):
        a.append(first())
        b.append(second())
    return a, b


def largest_that_fits(fits: Callable[[int], bool], start: int, *, most: int) -> int | None:
    """Find the largest number that `fits`, up to `most`, by doubling from `start` and then bisecting; None if not even 1 fits."""
    size = start
    while not fits(size):
        if size == 1:
            return None
        size = max(1, size // 2)
    good, bad = size, None
    while bad is None and good < most:
        candidate = min(most, good * 2)
        good, bad = (candidate, None) if fits(candidate) else (good, candidate)
    for _ in range(HALVINGS):
        if bad is None or bad - good < 2:
            break
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def checkpoint_interval_s(write_s: float, failure_s: float) -> float:
    """Return the seconds between checkpoints that minimise the time lost to writing them and to repeated work.

    First-order formula of Daly 2006 (https://doi.org/10.1016/j.future.2004.11.016); Young 1974 has it without the last term.
    """
    return math.sqrt(2 * write_s * failure_s) - write_s if write_s < 2 * failure_s else failure_s
