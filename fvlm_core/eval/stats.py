"""Intervals and paired tests.

Units of resampling are clips: nine questions about one clip are not nine independent facts. Every statistic here is a
function of sums over clips, so a resample is a row of multinomial counts and all of them are one matrix product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fvlm_core.eval.estimates import Estimate

INTERVAL = 0.95
DECIMALS = 6
"""Numbers are stored with this many decimals: more would be rounding noise of the machine."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""Sums [..., d] -> values [...]."""


def ratio(sums: np.ndarray) -> np.ndarray:
    """First column over second: a mean, token-weighted if the second counts tokens."""
    return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class Bootstrap:
    """Makes every estimate of an evaluation."""

    resamples: int
    seed: int

    def estimate(self, rows: np.ndarray, clusters: Sequence[str], statistic: Statistic = ratio, *, count: int | None = None) -> Estimate:
        """The statistic of the sum of `rows` [n, d], with its percentile interval over resampled clusters.

        `count` says what was averaged (default: the rows). The interval is widened where needed to hold the estimate itself,
        which percentiles of a biased statistic may miss. Raises ValueError for no rows.
        """
        rows = np.asarray(rows, np.float64)
        if len(rows) == 0:
            raise ValueError("nothing to estimate from")
        names, members = np.unique(np.asarray(clusters), return_inverse=True)
        sums = np.zeros((len(names), rows.shape[1]))
        np.add.at(sums, members, rows)
        value = float(statistic(sums.sum(0)))
        picks = np.random.default_rng(self.seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=self.resamples)
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample can lack what the statistic divides by
            values = statistic(picks @ sums)
        low, high = np.nanquantile(values, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2])
        return Estimate(
            value=round(value, DECIMALS),
            low=round(min(float(low), value), DECIMALS),
            high=round(max(float(high), value), DECIMALS),
            n=len(names),
            count=len(rows) if count is None else count,
        )

    def mean(self, values: Sequence[float] | np.ndarray, clusters: Sequence[str]) -> Estimate:
        """Mean of one number (or truth) per row."""
        numbers = np.asarray(values, np.float64)
        return self.estimate(np.stack([numbers, np.ones_like(numbers)], 1), clusters)

    def weighted_mean(self, sums: np.ndarray, clusters: Sequence[str]) -> Estimate:
        """Of rows (sum, weight) [n, 2], the total sum over the total weight; counts the weight, e.g. labelled tokens."""
        return self.estimate(sums, clusters, count=int(sums[:, 1].sum()))


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value that two methods are equally often right, from the questions only one of them got."""
    from scipy.stats import binomtest  # half a second that only this needs

    return round(float(binomtest(only_a, only_a + only_b).pvalue), DECIMALS) if only_a + only_b else 1.0
