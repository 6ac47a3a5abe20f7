"""The size to train: the lowest loss that the grid's runs predict at the final budget, with the runner-up and how sure that is.

The rule was chosen by simulation (`python -m benchmarks.scaling_coverage` prints its regret beside that of others): the joint law where
the runs determine it; else each size's own law over data, which needs no fourth size; else, and only then, the measured losses at the
largest budget that all sizes share, which favour sizes that are too small for a larger budget.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fvlm_core.errors import UserError
from fvlm_core.scaling.fits import Grid, Law, NotIdentifiableError, fit_data_law, fit_law, weight_of
from fvlm_core.scaling.jobs import GridPoint, Weights

RESAMPLES = 100
"""Of the fit's residuals, behind the share of them in which the chosen size stays the best."""
SEED = 0


@dataclass(frozen=True)
class Choice:
    """A size, and what speaks for it."""

    size: str
    reason: str
    runner_up: str = ""
    """The second best; empty where there is one size."""
    margin: float | None = None
    """Loss of the runner-up minus that of the chosen size, nats per labelled token."""
    share: float | None = None
    """Share of the resamples in which the chosen size beats the runner-up; None where losses were compared as measured."""


@dataclass(frozen=True)
class Ranking:
    """Losses that are expected of the sizes, in the order of the tokens that were asked for."""

    basis: str
    losses: np.ndarray
    refit: Callable[[np.ndarray], np.ndarray] | None = None
    """Losses of the runs -> the expected losses again; None where nothing was fitted."""
    fitted: np.ndarray | None = None
    """What the fit says of the runs, [M]."""
    degrees: int = 0


def rank(grid: Grid, params: np.ndarray, tokens: np.ndarray, weights: Weights = "relative") -> Ranking:
    """The losses expected of sizes (`params` [S]) after so many `tokens` [S]. Raises NotIdentifiableError where no law is determined."""
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
    """The size to train for `target_flops` (None: the largest budget of the grid), from one variant's runs.

    Raises UserError where nothing can be fitted and no budget was run at every size.
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
    """Share of the resamples of the residuals in which `first` stays better than `second`."""
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
