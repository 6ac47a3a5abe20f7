"""Recipes of the training phases: parts of the profile, with what earlier phases decided laid over them."""

from collections.abc import Mapping
from typing import Any

from fvlm_core.config import LossSettings, ModelSettings, Recipe
from fvlm_core.dotted import with_changes
from fvlm_core.scaling.jobs import Variant
from fvlm_core.settings import Settings
from tasks.changes import Values, fitted
from tasks.config import Ablation, Base, PipelineConfig, Size, Stage

SHARDS = "input:shards"
START = "input:start"
"""The run whose model a recipe starts from."""
OWN_DATA = "data.mixture"
"""A stage's data is its own: a task ablation that wins does not replace it."""


def base_recipe(config: PipelineConfig, name: str, phase: str, changes: Mapping[str, Any]) -> Recipe:
    """The base recipe with `changes` laid over it."""
    return _recipe(name, phase, config.model, config.base, config.base.loss, changes)


def ablation_recipe(config: PipelineConfig, ablation: Ablation, changes: Mapping[str, Any]) -> Recipe:
    """The base recipe with `changes` and then the ablation's one change."""
    return base_recipe(config, f"ablation-{ablation.name}", "ablations", {**changes, **ablation.change})


def grid_recipe(config: PipelineConfig, size: Size, budget_flops: float, *, variant: Variant, changes: Mapping[str, Any]) -> Recipe:
    """A run of the scaling grid: a size trained for a budget, foveated or as the baseline of pooled tokens."""
    pooled = {"model.query": "pooled", "model.tokens_per_frame": config.scaling.baseline_tokens_per_frame}
    length = {"model.llm": size.llm.model_dump(mode="json"), "run.steps": None, "run.budget_flops": budget_flops}
    name = f"grid-{size.name}-{budget_flops:.2e}-{variant}".replace("+", "")
    return base_recipe(config, name, "scaling", {**changes, **length, **(pooled if variant == "baseline" else {})})


def stage_recipe(config: PipelineConfig, name: str, *, changes: Mapping[str, Any], start: bool) -> Recipe:
    """A stage of the final training, from the model's own start or (`start`) from the stage before."""
    kept = {path: value for path, value in changes.items() if path != OWN_DATA}
    stage: Stage = getattr(config.stages, name)
    recipe = _recipe(name, "train", config.model, stage, config.base.loss, kept)
    return recipe.with_changes({"init_from": START}) if start else recipe


def settings(recipe: Recipe) -> Values:
    """The recipe as a step's settings: without `output`, which the step gives."""
    return recipe.model_dump(mode="json", exclude={"output"})


def _recipe(name: str, phase: str, model: ModelSettings, part: Base | Stage, loss: LossSettings, changes: Mapping[str, Any]) -> Recipe:
    values: Values = {
        "name": name,
        "phase": phase,
        "output": "output",
        "shards": SHARDS,
        "model": _dump(model),
        "data": _dump(part.data),
        "loss": _dump(loss),
        "optimizer": _dump(part.optimizer),
        "run": _dump(part.run),
    }
    return Recipe.from_values(fitted(with_changes(values, changes)), where=f"the recipe of {name}")


def _dump(part: Settings) -> Values:
    return part.model_dump(mode="json")
