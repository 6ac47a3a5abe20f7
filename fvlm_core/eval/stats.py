"""Confidence intervals and paired tests.

The resampling unit is the clip, because questions about the same clip are not independent. Every statistic here is a function of
sums over clips, so a resample is a row of multinomial counts, and all resamples are one matrix product.

Shares from few clips get an exact interval instead: a bootstrap of 0 of 5 would claim that the share is certainly 0.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fvlm_core.eval.estimates import Estimate

INTERVAL = 0.95
DECIMALS = 6
"""Number of decimals in stored results; further ones are floating-point noise."""

FEW_CLIPS = 100
"""With fewer clips than this, the interval of a share is exact instead of bootstrapped."""
ENUMERATED = 14
"""With at most this many differing clips, the paired test enumerates all sign flips and is exact."""
FLIPS = 20_000
"""Number of random sign flips otherwise."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""Maps sums [..., d] to values [...]."""


def ratio(sums: np.ndarray) -> np.ndarray:
    """First column divided by the second: a mean, which is token-weighted if the second column counts tokens."""
    return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class Bootstrap:
    """Computes estimates with confidence intervals by a cluster bootstrap."""

    resamples: int
    seed: int

    def estimate(self, rows: np.ndarray, clusters: Sequence[str], statistic: Statistic = ratio, *, count: int | None = None) -> Estimate:
        """The statistic of the sum of `rows` [n, d], with its expanded percentile interval over resampled clusters.

        Plain percentile intervals are too narrow for few clusters; expanded, they are as wide as Student's t interval of a mean
        (Hesterberg 2015, The American Statistician 69(4), 371-386). The interval is widened if needed to contain the estimate itself,
        which the percentiles of a biased statistic may miss. `count` is the number of averaged values (default: the number of rows).
        Raises ValueError for no rows.
        """
        rows = np.asarray(rows, np.float64)
        if len(rows) == 0:
            raise ValueError("nothing to estimate from")
        names, members = np.unique(np.asarray(clusters), return_inverse=True)
        sums = np.zeros((len(names), rows.shape[1]))
        np.add.at(sums, members, rows)
        value = float(statistic(sums.sum(0)))
        picks = np.random.default_rng(self.seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=self.resamples)
        with np.errstate(divide="ignore", invalid="ignore"):  # the statistic's denominator can be 0 in a resample
            values = statistic(picks @ sums)
        low, high = np.nanquantile(values, _levels(len(names)))
        return Estimate(
            value=round(value, DECIMALS),
            low=round(min(float(low), value), DECIMALS),
            high=round(max(float(high), value), DECIMALS),
            n=len(names),
            count=len(rows) if count is None else count,
        )

    def mean(self, values: Sequence[float] | np.ndarray, clusters: Sequence[str]) -> Estimate:
        """Mean of one number (or boolean) per row."""
        numbers = np.asarray(values, np.float64)
        return self.estimate(np.stack([numbers, np.ones_like(numbers)], 1), clusters)

    def share(self, truths: Sequence[bool] | np.ndarray, clusters: Sequence[str]) -> Estimate:
        """Share of true values. With fewer than `FEW_CLIPS` clusters, the interval is `exact_interval`."""
        estimate = self.mean(truths, clusters)
        if estimate.n >= FEW_CLIPS:
            return estimate
        low, high = exact_interval(np.asarray(truths, bool), clusters)
        return estimate.model_copy(update={"low": round(low, DECIMALS), "high": round(high, DECIMALS), "exact": True})

    def weighted_mean(self, sums: np.ndarray, clusters: Sequence[str]) -> Estimate:
        """Total sum divided by total weight, for rows (sum, weight) [n, 2]; `count` is the total weight, e.g. labelled tokens."""
        return self.estimate(sums, clusters, count=int(sums[:, 1].sum()))

    def two_way(self, values: Sequence[float] | np.ndarray, first: Sequence[str], second: Sequence[str]) -> Estimate:
        """Mean of one number (or boolean) per row, with an interval over two crossed factors, such as clips and the digits drawn in them.

        The levels of both factors are resampled independently, and a row's weight is the product of its two levels' counts: the pigeonhole
        bootstrap (Owen 2007, Annals of Applied Statistics 1(2), 386-411, https://doi.org/10.1214/07-AOAS122). It is conservative: it counts
        the variance of single rows up to three times. Percentiles are expanded as in `estimate`, for the factor with fewer levels, whose
        number is `n`. Raises ValueError for no rows.
        """
        numbers = np.asarray(values, np.float64)
        if len(numbers) == 0:
            raise ValueError("nothing to estimate from")
        rng, value = np.random.default_rng(self.seed), float(numbers.mean())
        levels = [np.unique(np.asarray(factor), return_inverse=True) for factor in (first, second)]
        means = np.full(self.resamples, np.nan)
        for place in range(self.resamples):
            weights = np.ones(len(numbers))
            for names, members in levels:
                weights *= rng.multinomial(len(names), np.full(len(names), 1 / len(names)))[members]
            if total := weights.sum():  # with few levels, a resample may contain no row
                means[place] = weights @ numbers / total
        n = min(len(names) for names, _ in levels)
        low, high = np.nanquantile(means, _levels(n))
        return Estimate(
            value=round(value, DECIMALS),
            low=round(min(float(low), value), DECIMALS),
            high=round(max(float(high), value), DECIMALS),
            n=n,
            count=len(numbers),
        )


def _levels(clusters: int) -> tuple[float, float]:
    """Levels of the expanded percentile interval: the normal CDF at Student's t quantile times sqrt(n / (n - 1))."""
    from scipy.special import ndtr, stdtrit  # imported lazily, as below

    if clusters == 1:
        return 0.0, 1.0
    tail = ndtr(stdtrit(clusters - 1, (1 - INTERVAL) / 2) * (clusters / (clusters - 1)) ** 0.5)
    return tail, 1 - tail


def exact_interval(truths: np.ndarray, clusters: Sequence[str]) -> tuple[float, float]:
    """Clopper-Pearson 95 % interval of a share, with the effective sample size of clustered questions in place of their number.

    The effective sample size is that of Korn and Graubard 1998, Survey Methodology 24(2), 193-201: n divided by the design effect, times
    (t quantile with n - 1 degrees of freedom / t quantile with clusters - 1)^2. If every cluster is one question, this is the
    Clopper-Pearson interval itself. If all questions agree, the design effect cannot be estimated, and a cluster counts as one question.
    """
    from scipy.stats import beta, t  # imported lazily: half a second

    n, p = len(truths), float(np.mean(truths))
    names, members = np.unique(np.asarray(clusters), return_inverse=True)
    m = len(names)
    if m == n:
        effective = float(n)
    elif p in (0.0, 1.0) or m < 2:
        effective = float(m)
    else:
        residuals = np.bincount(members, weights=truths - p, minlength=m)
        variance = m / (m - 1) * float((residuals**2).sum()) / n**2
        effect = variance / (p * (1 - p) / n)
        correction = (t.ppf((1 + INTERVAL) / 2, n - 1) / t.ppf((1 + INTERVAL) / 2, m - 1)) ** 2
        effective = min(float(n), n / max(effect, 1e-9)) * float(correction)
    k, tail = p * effective, (1 - INTERVAL) / 2
    low = float(beta.ppf(tail, k, effective - k + 1)) if k > 0 else 0.0
    high = float(beta.ppf(1 - tail, k + 1, effective - k)) if k < effective else 1.0
    return min(low, p), max(high, p)


def sign_flip(differences: Sequence[float] | np.ndarray, clusters: Sequence[str], *, seed: int = 0) -> float:
    """Two-sided p-value of the null hypothesis that two methods score alike, from their differences on the same questions.

    A permutation test by cluster: under the null hypothesis, the summed difference of each cluster could as well have the opposite sign.
    Exact for up to `ENUMERATED` clusters that differ; otherwise from `FLIPS` random draws, counting the observed one (Phipson and Smyth
    2010, https://doi.org/10.2202/1544-6115.1585), so the p-value is never below 1 / (FLIPS + 1).
    """
    _, members = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(members, weights=np.asarray(differences, np.float64))
    sums = sums[np.abs(sums) > 1e-12]
    observed = abs(float(sums.sum())) - 1e-9
    if not len(sums):
        return 1.0
    if len(sums) <= ENUMERATED:
        signs = 1 - 2 * ((np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1)
        return round(float(np.mean(np.abs(signs @ sums) >= observed)), DECIMALS)
    rng = np.random.default_rng([seed, zlib.crc32(sums.tobytes())])
    signs = rng.integers(0, 2, (FLIPS, len(sums)), np.int8) * 2 - 1
    return round((1 + int(np.sum(np.abs(signs @ sums) >= observed))) / (1 + FLIPS), DECIMALS)


@dataclass(frozen=True)
class SeedDifference:
    """Difference between two methods over training seeds, each of which trained both."""

    by_seed: dict[int, float]
    mean: float
    low: float
    high: float
    """Student's 95 % interval of the mean, with the seeds as the sample; not adjusted for the number of comparisons."""
    p_holm: float
    """Two-sided p-value of the t test, Holm-adjusted over all comparisons with the same method."""


def over_seeds(ours: Mapping[int, float], others: Mapping[str, Mapping[int, float]]) -> dict[str, SeedDifference]:
    """Compare a method with others, given the results of each by training seed: `ours` minus each other.

    An interval over clips says what other clips would change for these very models; this one says what other seeds would. Methods that
    share fewer than two seeds with `ours` are left out.
    """
    from scipy.stats import t  # imported lazily, as above

    gains = {name: {seed: ours[seed] - other[seed] for seed in ours if seed in other} for name, other in others.items()}
    gains = {name: gain for name, gain in gains.items() if len(gain) > 1}
    means, halves, p_values = {}, {}, {}
    for name, gain in gains.items():
        values = np.array(list(gain.values()))
        means[name], error = float(values.mean()), float(values.std(ddof=1)) / len(values) ** 0.5
        halves[name] = float(t.ppf((1 + INTERVAL) / 2, len(values) - 1)) * error
        p_values[name] = float(2 * t.sf(abs(means[name]) / error, len(values) - 1)) if error else float(means[name] == 0)
    return {
        name: SeedDifference(gains[name], means[name], means[name] - halves[name], means[name] + halves[name], p)
        for name, p in zip(gains, holm(list(p_values.values())), strict=True)
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values (Holm 1979) of a family of tests, which control the family-wise error rate."""
    order = np.argsort(p_values, kind="stable")
    adjusted, running = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(order.tolist()):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = round(running, DECIMALS)
    return adjusted
