"""Validation: the mean loss of each pass per labelled token or pair, over a fixed set of samples that is divided among the ranks."""

import torch

from fvlm_core.config import BestSettings, Recipe
from fvlm_core.data.loader import VAL_SEED, damage_count, val_batches
from fvlm_core.data.plan import MixedSamples
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.errors import UserError
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.train.distributed import World
from fvlm_core.train.objective import Objective


def score(losses: dict[str, float], best: BestSettings) -> float:
    """Return the score of a checkpoint; the best one has the lowest. `losses`: validation losses by pass, in the order of passes.

    It is a weighted mean of the losses (default: that of the last pass), plus `best.drift` times the absolute difference between the losses
    of the last two passes.
    """
    weights = best.passes or {list(losses)[-1]: 1.0}
    mean = sum(losses[name] * weight for name, weight in weights.items()) / sum(weights.values())
    *_, before, last = (0.0, *losses.values())
    return mean + best.drift * abs(last - before) if best.drift else mean


def require_validation_samples(shards: ShardSet, recipe: Recipe) -> None:
    """Raise UserError if the shards lack validation samples for the recipe. Called at the start, to fail before the first evaluation."""
    data = recipe.data
    try:
        MixedSamples(shards, data.held_out, "val", VAL_SEED, tokens_per_frame=recipe.model.tokens_per_frame)
    except UserError as error:
        key = "data.mixture" if data.validation is None else "data.validation.mixture"
        raise UserError(error.what, where=error.where.replace("data.mixture", key), fix=error.fix) from error


@torch.no_grad()
def validation_losses(model: FoveatedVLM, shards: ShardSet, recipe: Recipe, objective: Objective, world: World) -> dict[str, float]:
    """Return the means per unit of the objective's named values (first, the passes' losses). Raises UserError without any units."""
    sums, units = torch.zeros(len(objective.names), dtype=torch.float64, device=world.device), 0
    damage = damage_count(shards, recipe.data.held_out, "val")
    batches = val_batches(
        shards,
        recipe.run.eval_samples,
        recipe.data,
        tokens_per_frame=recipe.model.tokens_per_frame,
        budget=recipe.run.micro_batch,
        rank=world.rank,
        world_size=world.size,
        damage=damage,
    )
    model.eval()
    for batch in batches:
        parts = objective(model, batch, world.device).parts
        units += objective.units(batch)
        sums += torch.stack([parts[name].double() for name in objective.names])  # kept on the device: no synchronisation per batch
    model.train()
    *totals, count, damaged = world.sum([*sums.tolist(), units, len(damage.new)])
    if damaged:
        damage.merge(world.union(damage.new))
        damage.check()
    if not count:
        raise UserError("the validation samples have no labels", where="run.eval_samples", fix="evaluate more samples")
    return {name: total / count for name, total in zip(objective.names, totals, strict=True)}
