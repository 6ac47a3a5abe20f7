"""The ablations of a profile (`ablations`, `ablation_seeds`): their settings, their validation, and the recipes of their runs."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from fvlm_core.config import ModelSettings, Positive, Recipe, SourceShares
from fvlm_core.dotted import UnknownPathError, flatten, value_at, with_changes
from fvlm_core.settings import Settings, explain
from tasks.recipes import Base, Name, Values, base_recipe, with_consistent_settings

Group = dict[str, bool | int | float | str | list[float]]
"""A group of settings, e.g. `model.glance`. Keys that are left out have their defaults."""
Value = bool | int | float | str | list[float] | SourceShares | Group

BASELINE = "baseline"
"""Name of the runs that ablations are compared with."""


class Ablation(Settings):
    """A run that differs from the base recipe in exactly one setting."""

    name: Name
    """Names the run: `ablation-NAME`."""
    hypothesis: Annotated[str, Field(min_length=1)]
    """The expected result, and why; it is reported next to the actual result."""
    path: str
    """Dotted path of the setting in a recipe, e.g. `optimizer.lr_llm`."""
    value: Value
    """Its value in this run. A group that the base does not have is one value: `path: model.glance, value: {px: 112}`."""
    control: bool = False
    """A control or baseline (random queries, several tokens per frame): it is compared with the others, but never chosen as the winner."""

    @model_validator(mode="before")
    @classmethod
    def _exactly_one_change(cls, values: Any) -> Any:
        """Accept the form `changes: {PATH: VALUE}` too, and require exactly one change."""
        if not isinstance(values, dict):
            return values
        given = values.get("changes") or {}
        changes = [*given, *([values["path"]] if values.get("path") else [])]
        if len(changes) != 1:
            said = f"{len(changes)}: {', '.join(map(str, changes))}" if changes else "none"
            raise ValueError(f"an ablation has exactly one change, {values.get('name', 'this one')} has {said}")
        rest = {name: value for name, value in values.items() if name != "changes"}
        return rest | {"path": changes[0], "value": given[changes[0]]} if given else rest

    @field_validator("value")
    @classmethod
    def _one_way_to_write_it(cls, value: Value) -> Value:
        """Store 1.0 as 1: they are the same setting, and a form in a browser only knows the latter."""
        return {key: _plain(one) for key, one in value.items()} if isinstance(value, dict) else _plain(value)

    @property
    def change(self) -> dict[str, Any]:
        """Its one change as plain values, by dotted path."""
        return {self.path: self.model_dump(mode="json")["value"]}


class AblationSeeds(Settings):
    """Seeds of the ablation runs. A single seed each does not measure the noise, and so gives no verdict."""

    baseline: Positive = 1
    """Number of baseline runs, each with its own seed."""
    others: Positive = 1
    """Number of runs of every ablation. They use the first seeds of the baseline, so that runs are compared in pairs."""
    confirm: Positive = 2
    """Number of further runs of the winner and of the baseline, with new seeds: the winner is adopted only if they confirm it."""

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.others > self.baseline:
            raise ValueError(f"others {self.others} is more than baseline {self.baseline}: a seed that the baseline lacks has no pair")
        return self


def check_ablations(ablations: Sequence[Ablation], model: ModelSettings, base: Base) -> None:
    """Check that each ablation changes an existing setting of the base recipe to another valid value. Raises ValueError if not."""
    recipe = {"model": model.model_dump(mode="json")} | base.model_dump(mode="json")
    for ablation in ablations:
        where = f"ablations: {ablation.name}"
        try:
            changed = with_consistent_settings(with_changes(recipe, ablation.change))
        except UnknownPathError as error:
            known = ", ".join(flatten(recipe))
            raise ValueError(f"{where}: no setting {ablation.path!r}; there are: {known}") from error
        if changed == with_consistent_settings(recipe):
            raise ValueError(f"{where}: {ablation.path} is {ablation.value!r} in the base already")
        if isinstance(ablation.value, dict) and value_at(recipe, ablation.path) is not None:
            raise ValueError(f"{where}: the base has {ablation.path} already; change one of its keys, as {ablation.path}.KEY")
        try:
            Recipe.model_validate({"name": ablation.name, "output": "output", "shards": "shards"} | changed)
        except ValidationError as error:
            raise ValueError(f"{where}: {explain(error, Recipe)}") from error


def baseline_recipe(model: ModelSettings, base: Base, seed: int, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a baseline run: the base recipe with `changes`, and with `seed` added to its own seed."""
    return base_recipe(model, base, f"ablation-{BASELINE}{_seeded(seed)}", "ablations", {**changes, **_compared(base, seed)})


def ablation_recipe(model: ModelSettings, base: Base, ablation: Ablation, seed: int, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe of an ablation run: the baseline of the same seed with the ablation's one change."""
    name = f"ablation-{ablation.name}{_seeded(seed)}"
    return base_recipe(model, base, name, "ablations", {**changes, **_compared(base, seed), **ablation.change})


def _compared(base: Base, seed: int) -> Values:
    """Return the settings that all runs of a comparison share. A run that diverges is a result, not an error."""
    return {"run.seed": base.run.seed + seed, "run.on_divergence": "end"}


def _seeded(seed: int) -> str:
    return f"-seed{seed}" if seed else ""


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
