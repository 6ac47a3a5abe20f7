"""Which of two ways is faster: steps in turn, medians, and an interval; a gain within the spread is none.

Steps alternate A, B, A, B, so that a drift of the machine meets both alike, and step i of both trains on the same samples. The interval of
the median ratio is by order statistics: it assumes nothing of how times are distributed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from scipy.stats import binom

CONFIDENCE = 0.95
MIN_PAIRS = 6
"""With fewer no interval of 95 % exists."""
HALVINGS = 2
"""How often `largest_that_fits` halves what lies between a size that fits and its double."""


@dataclass(frozen=True)
class Ratio:
    """How many times as fast B is as A: the median over pairs of steps, with its interval."""

    value: float
    low: float
    high: float
    pairs: int


def ratio_of(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """B's speed over A's, from the seconds of paired steps. With under `MIN_PAIRS` pairs the interval is everything."""
    ratios = sorted(a / b for a, b in zip(first, second, strict=True))
    n = len(ratios)
    if n < MIN_PAIRS:
        return Ratio(median(ratios), 0.0, math.inf, n)
    tail = int(binom.ppf((1 - CONFIDENCE) / 2, n, 0.5))  # the largest k with P(fewer than k below the median) <= 2.5 %
    return Ratio(median(ratios), ratios[max(0, tail - 1)], ratios[min(n - 1, n - tail)], n)


def alternate(first: Callable[[], float], second: Callable[[], float], *, pairs: int, max_s: float) -> tuple[list[float], list[float]]:
    """Seconds of paired steps; ends early when `max_s` is spent, but not before `MIN_PAIRS` pairs (or as many as asked for)."""
    a: list[float] = []
    b: list[float] = []
    while len(a) < pairs and (len(a) < MIN_PAIRS or sum(a) + sum(b) < max_s):
        a.append(first())
        b.append(second())
    return a, b


def largest_that_fits(fits: Callable[[int], bool], start: int, *, most: int) -> int | None:
    """The largest number that `fits`, from `start` by doubling and then by halving what is between; None where not even 1 does."""
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
    """Seconds between checkpoints that lose the least time to writing and to work done again.

    Daly 2006 (https://doi.org/10.1016/j.future.2004.11.016), to first order; Young 1974 has it without the last term.
    """
    return math.sqrt(2 * write_s * failure_s) - write_s if write_s < 2 * failure_s else failure_s
