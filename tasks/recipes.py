"""Recipes of the training phases: parts of the profile, with what earlier phases decided applied to them."""

from collections.abc import Mapping
from typing import Any

from fvlm_core.config import Recipe
from fvlm_core.dotted import with_changes
from fvlm_core.settings import Settings
from tasks.config import Ablation, Base, PipelineConfig, Stage, Values, fitted

AN_INPUT = "input"
"""Stands for the path of an input, which is known when the job starts."""
OWN_DATA = "data.mixture"
"""A stage's data is its own: an ablation of the data that wins does not replace it."""


def base_recipe(config: PipelineConfig, name: str, phase: str, changes: Mapping[str, Any]) -> Recipe:
    """The base recipe with `changes`."""
    return _recipe(name, phase, config, config.base, changes)


def baseline_recipe(config: PipelineConfig, seed: int, changes: Mapping[str, Any]) -> Recipe:
    """The base recipe with `changes`, as ablations are compared with it; `seed` is added to its own."""
    return base_recipe(config, f"ablation-baseline{_seeded(seed)}", "ablations", {**changes, **_compared(config, seed)})


def ablation_recipe(config: PipelineConfig, ablation: Ablation, seed: int, changes: Mapping[str, Any]) -> Recipe:
    """The baseline of the same seed with the ablation's one change."""
    name = f"ablation-{ablation.name}{_seeded(seed)}"
    return base_recipe(config, name, "ablations", {**changes, **_compared(config, seed), **ablation.change})


def _compared(config: PipelineConfig, seed: int) -> Values:
    """What all runs of a comparison have; that one diverges is a result."""
    return {"run.seed": config.base.run.seed + seed, "run.on_divergence": "end"}


def _seeded(seed: int) -> str:
    return f"-seed{seed}" if seed else ""


def stage_recipe(config: PipelineConfig, name: str, *, changes: Mapping[str, Any], start: bool) -> Recipe:
    """A stage of the final training, from the model's own start or (`start`) from the stage before."""
    kept = {path: value for path, value in changes.items() if path != OWN_DATA}
    stage = config.stages.present[name]
    recipe = _recipe(name, "dpo" if stage.dpo else "train", config, stage, kept)
    return recipe.with_changes({"init_from": AN_INPUT}) if start else recipe


def _recipe(name: str, phase: str, config: PipelineConfig, part: Base | Stage, changes: Mapping[str, Any]) -> Recipe:
    values: Values = {
        "name": name,
        "phase": phase,
        "output": "output",
        "shards": AN_INPUT,
        "model": _dump(config.model),
        "data": _dump(part.data),
        "loss": _dump(part.loss or config.base.loss),
        "dpo": _dump(part.dpo) if isinstance(part, Stage) and part.dpo else None,
        "best": _dump(part.best),
        "optimizer": _dump(part.optimizer),
        "run": _dump(part.run),
    }
    return Recipe.from_values(fitted(with_changes(values, changes)), where=f"the recipe of {name}")


def _dump(part: Settings) -> Values:
    return part.model_dump(mode="json")
