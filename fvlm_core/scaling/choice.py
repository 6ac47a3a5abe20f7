"""The size to train, from the studies of the grid's variants."""

import numpy as np

from fvlm_core.errors import UserError
from fvlm_core.scaling.jobs import Variant
from fvlm_core.scaling.study import Study


def choose(studies: dict[Variant, Study], *, target_flops: float | None) -> tuple[str, str]:
    """The size to train and why: by the joint law where it is identified and a target beyond the grid is given, else by the
    lowest measured loss of the foveated model at the largest budget that all sizes were run at (equal losses: the smaller).

    Raises UserError without a foveated run.
    """
    if "foveated" not in studies:
        raise UserError("no foveated run to choose a size from", where="runs", fix="give at least one run of the variant foveated")
    one = studies["foveated"]
    budgets = {size: {point.budget_flops for point in one.points if point.size == size} for size in (point.size for point in one.points)}
    shared = set.intersection(*budgets.values())
    if target_flops is not None and one.law is not None and target_flops > one.grid.budget.max():
        sizes = {point.size: point.params for point in one.points}
        per_token = {size: float(np.exp(np.polyval(one.cost_per_token, np.log(params)))) for size, params in sizes.items()}
        predicted = {
            size: float(one.law.loss(np.array(params), np.array(target_flops / per_token[size]))) for size, params in sizes.items()
        }
        chosen = min(predicted, key=lambda size: (predicted[size], sizes[size]))
        return chosen, f"lowest loss predicted by the joint law at {target_flops:.2e} FLOPs: {_listed(predicted)}"
    if not shared:
        raise UserError(
            "no budget was run at every size, so sizes cannot be compared",
            where="runs",
            fix="run the foveated variant at one budget at all sizes",
        )
    budget = max(shared)
    at_largest = sorted((point for point in one.points if point.budget_flops == budget), key=lambda point: (point.loss, point.params))
    reason = f"lowest measured loss at the largest budget, {budget:.2e} FLOPs: {_listed({p.size: p.loss for p in at_largest})}"
    if target_flops is not None and target_flops > budget:
        reason += f"; no law could be fitted that says what holds at the final {target_flops:.2e} FLOPs"
    return at_largest[0].size, reason


def _listed(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {loss:.4f}" for name, loss in sorted(losses.items(), key=lambda item: item[1]))
