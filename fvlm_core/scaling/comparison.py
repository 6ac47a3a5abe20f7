"""Which differences to a baseline are more than noise: losses of several runs, several seeds each.

Runs of equal seeds see the same samples in the same order, so seeds are blocks: loss = run + seed + noise, by least squares. The noise is
what that leaves over; differences have t tests with it, adjusted for their number by Holm's method. Where blocks leave nothing over (one
seed of all but the baseline), or a run shares no seed with the others, the noise is the seeds' own scatter within a run and pairs are
given up. With one seed of everything there is no noise to compare with, and so no verdict.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2, t

from fvlm_core.eval.stats import holm
from fvlm_core.scaling.intervals import CONFIDENCE
from fvlm_core.scaling.jobs import Quantity

NOT_MEASURED = "noise not measured: no verdict (one seed of every run)"


@dataclass(frozen=True)
class Difference:
    """A run against the baseline."""

    delta: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All of them."""

    differences: dict[str, Difference]
    noise: Quantity
    """Standard deviation of one run's loss, nats."""
    method: str
    degrees: int = 0
    """Of freedom, of the noise."""


def compare_losses(losses: dict[str, dict[int, float]], baseline: str) -> Comparison:
    """Losses by run and seed, against the run called `baseline`."""
    names, cells = list(losses), [(name, seed, loss) for name, runs in losses.items() for seed, loss in runs.items()]
    others = [name for name in names if name != baseline]
    means = {name: float(np.mean(list(runs.values()))) for name, runs in losses.items()}
    seeds = sorted({seed for _, seed, _ in cells})
    y = np.array([loss for *_, loss in cells])
    of_run = np.array([[name == one for one in names] for name, _, _ in cells], float)
    of_seed = np.array([[seed == one for one in seeds[1:]] for _, seed, _ in cells], float)
    for design, how in ((np.hstack([of_run, of_seed]), "seeds as blocks"), (of_run, "runs not paired: too few seeds in common")):
        spare = len(y) - int(np.linalg.matrix_rank(design))
        inverse = np.linalg.pinv(design.T @ design)
        contrasts = {name: np.zeros(design.shape[1]) for name in others}
        for name, contrast in contrasts.items():
            contrast[[names.index(name), names.index(baseline)]] = 1, -1
        # runs that share seeds with the baseline neither themselves nor through others: blocks say nothing about the difference
        estimable = all(np.allclose(contrast @ inverse @ design.T @ design, contrast) for contrast in contrasts.values())
        if spare < 1 or not estimable:
            continue
        effects = inverse @ design.T @ y
        variance = float(np.sum((y - design @ effects) ** 2)) / spare
        deltas = {name: float(contrast @ effects) for name, contrast in contrasts.items()}
        errors = {name: float(np.sqrt(variance * (contrast @ inverse @ contrast))) for name, contrast in contrasts.items()}
        p_values = holm([float(2 * t.sf(abs(deltas[name]) / max(errors[name], 1e-300), spare)) for name in others])
        wide, strict = (float(t.ppf(1 - (1 - CONFIDENCE) / 2 / count, spare)) for count in (1, max(1, len(others))))
        found = {
            name: Difference(
                deltas[name], deltas[name] - wide * errors[name], deltas[name] + wide * errors[name], p_value, strict * errors[name]
            )
            for name, p_value in zip(others, p_values, strict=True)
        }
        low, high = (float(np.sqrt(variance * spare / chi2.ppf(share, spare))) for share in (0.975, 0.025))
        noise = Quantity(value=float(np.sqrt(variance)), low=low, high=high, reason=f"{spare} degrees of freedom")
        tests = f"t tests with {spare} degrees of freedom, Holm's adjustment for {len(others)} comparisons"
        return Comparison(found, noise, f"{how}; {tests}", spare)
    differences = {name: Difference(means[name] - means[baseline]) for name in others}
    return Comparison(differences, Quantity(value=None, reason=NOT_MEASURED), NOT_MEASURED)
