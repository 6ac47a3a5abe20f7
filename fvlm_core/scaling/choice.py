"""Choose the size to train: the one with the lowest predicted loss at the final budget, with the runner-up and the confidence.

The rule was selected by simulation (`python -m benchmarks.scaling_coverage` compares its regret with that of other rules): the joint law
if the runs determine it; else a law over data per size, which works with fewer than four sizes; else the measured losses at the largest
budget that all sizes share. The last is used only as a fallback, because it favours sizes that are too small for a larger budget.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fvlm_core.errors import UserError
from fvlm_core.scaling.fits import Grid, Law, NotIdentifiableError, fit_data_law, fit_law, weight_of
from fvlm_core.scaling.jobs import GridPoint, Weights

RESAMPLES = 100
"""Number of bootstrap resamples of the fit's residuals behind `Choice.share`."""
SEED = 0


@dataclass(frozen=True)
class Choice:
    """The chosen size, with the evidence."""

    size: str
    reason: str
    runner_up: str = ""
    """The second-best size; empty if there is only one."""
    margin: float | None = None
    """Loss of the runner-up minus that of the chosen size, in nats per labelled token."""
    share: float | None = None
    """Share of resamples in which the chosen size beats the runner-up; None if measured losses were compared."""


@dataclass(frozen=True)
class Ranking:
    """Predicted losses of S sizes, from a fit to M runs."""

    basis: str
    """Name of the law."""
    losses: np.ndarray
    """[S]"""
    refit: Callable[[np.ndarray], np.ndarray] | None = None
    """Refits the law to other losses of the runs [M] and returns new predictions [S]; None if nothing was fitted."""
    fitted: np.ndarray | None = None
    """The fit's losses of the runs, [M]."""
    degrees: int = 0
    """Number of fitted parameters."""


def rank(grid: Grid, params: np.ndarray, tokens: np.ndarray, weights: Weights = "relative") -> Ranking:
    """Predict the losses of sizes `params` [S] after `tokens` [S]. Raises NotIdentifiableError if the runs determine no law."""
    try:
        law = fit_law(grid, weights)
    except NotIdentifiableError:
        own = fit_data_law(grid, weights)

        def again(loss: np.ndarray) -> np.ndarray:
            return fit_data_law(Grid(grid.params, grid.tokens, loss, grid.budget), weights).loss(params, tokens)

        fitted = own.loss(grid.params, grid.tokens)
        return Ranking("each size's own law over data", own.loss(params, tokens), again, fitted, own.degrees)
    projection = law.projection
    assert projection is not None

    def refit(loss: np.ndarray) -> np.ndarray:
        one = projection.with_loss(loss).minimum((law.alpha, law.beta))
        return Law.of(one, projection).loss(params, tokens)

    return Ranking("the joint law", law.loss(params, tokens), refit, law.loss(grid.params, grid.tokens), Law.DEGREES)


def choose(points: list[GridPoint], grid: Grid, *, target_flops: float | None, weights: Weights = "relative") -> Choice:
    """Choose the size to train for `target_flops` (None: the largest budget of the grid), from the runs of one variant.

    Raises UserError if no law can be fitted and no budget was run at every size.
    """
    params = {point.size: point.params for point in sorted(points, key=lambda point: point.params)}
    target = target_flops or float(grid.budget.max())
    spent = {size: np.median([point.flops / point.tokens for point in points if point.size == size]) for size in params}
    sizes, counts = list(params), np.array(list(params.values()), float)
    try:
        ranking = rank(grid, counts, target / np.array(list(spent.values())), weights)
    except NotIdentifiableError as error:
        return _measured(points, target_flops, str(error))
    order = np.argsort(ranking.losses, kind="stable")
    listed = ", ".join(f"{sizes[place]} {ranking.losses[place]:.4f}" for place in order)
    reason = f"lowest loss that {ranking.basis} predicts at {target:.2e} FLOPs: {listed}"
    if len(sizes) == 1:
        return Choice(sizes[0], reason)
    first, second = int(order[0]), int(order[1])
    share = _share(ranking, grid, weights, first, second)
    margin = float(ranking.losses[second] - ranking.losses[first])
    sure = "" if share is None else f"; ahead of {sizes[second]} by {margin:.4f} nats, in {share:.0%} of {RESAMPLES} resamples"
    if target > 1.001 * grid.budget.max():
        sure += f"; extrapolated {target / grid.budget.max():.0f} times beyond the grid"
    return Choice(sizes[first], reason + sure, sizes[second], margin, share)


def _share(ranking: Ranking, grid: Grid, weights: Weights, first: int, second: int) -> float | None:
    """Share of residual resamples in which size `first` has a lower predicted loss than size `second`."""
    if ranking.refit is None or ranking.fitted is None or len(grid) <= ranking.degrees:
        return None
    weight = weight_of(grid, weights)
    residuals = (grid.loss - ranking.fitted) * weight * np.sqrt(len(grid) / (len(grid) - ranking.degrees))
    rng, wins, tried = np.random.default_rng(SEED), 0, 0
    for _ in range(RESAMPLES):
        loss = ranking.fitted + rng.choice(residuals, len(grid)) / weight
        try:
            losses = ranking.refit(np.maximum(loss, 1e-6))
        except NotIdentifiableError:
            continue
        tried, wins = tried + 1, wins + bool(losses[first] < losses[second])
    return wins / tried if tried else None


def _measured(points: list[GridPoint], target_flops: float | None, why: str) -> Choice:
    budgets: Mapping[str, set[float]] = {
        size: {point.budget_flops for point in points if point.size == size} for size in (point.size for point in points)
    }
    shared = set.intersection(*budgets.values())
    if not shared:
        raise UserError(
            "no budget was run at every size, so sizes cannot be compared",
            where="runs",
            fix="run the foveated variant at one budget at all sizes",
        )
    budget = max(shared)
    means = {
        size: (float(np.mean([p.loss for p in points if p.size == size and p.budget_flops == budget])), params)
        for size, params in {point.size: point.params for point in points}.items()
    }
    order = sorted(means, key=lambda size: means[size])
    listed = ", ".join(f"{size} {means[size][0]:.4f}" for size in order)
    reason = f"lowest measured loss at the largest budget, {budget:.2e} FLOPs: {listed}"
    if target_flops is not None and target_flops > budget:
        reason += f"; no law could be fitted that says what holds at the final {target_flops:.2e} FLOPs ({why})"
    if len(order) == 1:
        return Choice(order[0], reason)
    return Choice(order[0], reason, order[1], means[order[1]][0] - means[order[0]][0])
