"""Recipes of the training phases, made of parts of a profile (`base`, `stages`) and the decisions of earlier phases."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Annotated, Any

from pydantic import Field

from fvlm_core.config import BestSettings, DataSettings, DpoSettings, LossSettings, ModelSettings, OptimizerSettings, Recipe, RunSettings
from fvlm_core.dotted import with_changes
from fvlm_core.settings import Settings

Name = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
"""Lower-case words joined by dashes: it becomes part of folder and run names."""
Values = dict[str, Any]
"""Settings as plain values."""

AN_INPUT = "input"
"""Placeholder for the path of an input, which is known when the job starts."""
OWN_DATA = "data.mixture"
"""Each stage has its own data, which a winning ablation of the data does not replace."""


class Base(Settings):
    """The recipe that the speed phase, ablations and the scaling grid start from."""

    data: DataSettings
    loss: LossSettings = LossSettings()
    best: BestSettings = BestSettings(use="last")
    """The default compares runs after the same samples, not each at its best step."""
    optimizer: OptimizerSettings = OptimizerSettings()
    run: RunSettings


class Stage(Settings):
    """One stage of the final training; the model comes from the profile, the ablations and the grid."""

    data: DataSettings
    loss: LossSettings | None = None
    """Losses; None: those of the base."""
    dpo: DpoSettings | None = None
    """Preference optimization instead of labelled tokens; requires `data.loss_on: preferences`."""
    best: BestSettings = BestSettings()
    optimizer: OptimizerSettings
    run: RunSettings


class Stages(Settings):
    """The stages, each of which starts from the previous one."""

    stage1: Stage
    """Video captioning."""
    stage2: Stage
    """Image question answering."""
    stage3: Stage
    """Video question answering."""
    dpo: Stage | None = None
    """Optional preference optimization after the three stages."""

    @property
    def present(self) -> dict[str, Stage]:
        """The stages to train, in order."""
        stages = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: stage for name, stage in stages.items() if stage is not None}


def base_recipe(model: ModelSettings, base: Base, name: str, phase: str, changes: Mapping[str, Any]) -> Recipe:
    """Return the base recipe with `changes`."""
    return _recipe(name, phase, model, base, base, changes)


def stage_recipe(model: ModelSettings, base: Base, stages: Stages, name: str, *, changes: Mapping[str, Any], start: bool) -> Recipe:
    """Return the recipe of a stage of the final training, which starts from the previous stage (`start`) or the model's own weights."""
    kept = {path: value for path, value in changes.items() if path != OWN_DATA}
    stage = stages.present[name]
    recipe = _recipe(name, "dpo" if stage.dpo else "train", model, base, stage, kept)
    return recipe.with_changes({"init_from": AN_INPUT}) if start else recipe


def with_consistent_settings(values: Values) -> Values:
    """Return the values with dependent settings made consistent.

    Pooled frames have no queries, and so no fine passes and no glance. There is one fine weight per fine pass (the last one repeats).
    Without fine passes, the coarse weight must be positive.
    """
    values = deepcopy(values)
    model, loss = values["model"], values["loss"]
    if model["query"] == "pooled":
        model["fine_iterations"], model["glance"] = 0, None
    weights, passes = loss["fine"], model["fine_iterations"]
    loss["fine"] = [*weights, *[weights[-1] if weights else 1.0] * (passes - len(weights))][:passes]
    if not passes and loss["coarse"] <= 0:
        loss["coarse"] = 1.0
    return values


def _recipe(name: str, phase: str, model: ModelSettings, base: Base, part: Base | Stage, changes: Mapping[str, Any]) -> Recipe:
    values: Values = {
        "name": name,
        "phase": phase,
        "output": "output",
        "shards": AN_INPUT,
        "model": _dump(model),
        "data": _dump(part.data),
        "loss": _dump(part.loss or base.loss),
        "dpo": _dump(part.dpo) if isinstance(part, Stage) and part.dpo else None,
        "best": _dump(part.best),
        "optimizer": _dump(part.optimizer),
        "run": _dump(part.run),
    }
    return Recipe.from_values(with_consistent_settings(with_changes(values, changes)), where=f"the recipe of {name}")


def _dump(part: Settings) -> Values:
    return part.model_dump(mode="json")
