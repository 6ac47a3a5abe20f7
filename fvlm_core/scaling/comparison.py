"""Test which differences to a baseline are significant, from the losses of several runs with several seeds each.

Runs with the same seed see the same samples in the same order, so seeds are blocks: loss = run + seed + noise, fitted by least squares.
The noise is estimated from the residuals; differences are tested by t tests with Holm's adjustment. If the block design leaves no degrees
of freedom (e.g. only the baseline has more than one seed), or a run shares no seeds with the others, pairing is dropped and the noise is
the scatter of seeds within runs. With one seed per run, noise cannot be estimated and there is no verdict.
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
    """Difference of a run to the baseline; see `fvlm_core.scaling.jobs.AblationRow` for the fields."""

    delta: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The differences of all runs to the baseline, with the noise estimate."""

    differences: dict[str, Difference]
    noise: Quantity
    """Standard deviation of one run's loss, in nats."""
    method: str
    degrees: int = 0
    """Degrees of freedom of the noise estimate."""


def compare_losses(losses: dict[str, dict[int, float]], baseline: str) -> Comparison:
    """Compare losses, given by run and seed, with those of the run called `baseline`."""
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
        # in the block design, a difference is not estimable if run and baseline share no seeds, directly or through other runs
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
