"""The part of a profile that says which ablations there are: `ablations`, `ablation_seeds`; their check, and the recipes of their runs."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from fvlm_core.config import ModelSettings, Positive, Recipe, SourceShares
from fvlm_core.dotted import UnknownPathError, flatten, value_at, with_changes
from fvlm_core.settings import Settings, explain
from tasks.recipes import Base, Name, Values, base_recipe, fitted

Group = dict[str, bool | int | float | str | list[float]]
"""The keys of a group of settings, e.g. of `model.glance`; those left out have their defaults."""
Value = bool | int | float | str | list[float] | SourceShares | Group

BASELINE = "baseline"
"""Name of the runs that ablations are compared with."""


class Ablation(Settings):
    """A run that differs from the base recipe in exactly one setting."""

    name: Name
    """Names the run: `ablation-NAME`."""
    hypothesis: Annotated[str, Field(min_length=1)]
    """What is expected of it, and why; it stands beside the result."""
    path: str
    """Dotted path of the setting in a recipe, e.g. `optimizer.lr_llm`."""
    value: Value
    """Its value in this run. A group that the base does not have is one value: `path: model.glance, value: {px: 112}`."""
    control: bool = False
    """A control or baseline (random queries, several tokens per frame): compared, but never the winner."""

    @model_validator(mode="before")
    @classmethod
    def _exactly_one_change(cls, values: Any) -> Any:
        """`changes: {PATH: VALUE}` is another way to write it; two changes, or none, are no ablation."""
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
        """1.0 and 1 are the same setting; a form in a browser knows only the latter."""
        return {key: _plain(one) for key, one in value.items()} if isinstance(value, dict) else _plain(value)

    @property
    def change(self) -> dict[str, Any]:
        """Its one change as plain values, by dotted path."""
        return {self.path: self.model_dump(mode="json")["value"]}


class AblationSeeds(Settings):
    """Seeds of the ablations' runs. One of each measures no noise, and so gives no verdict."""

    baseline: Positive = 1
    """Runs of the baseline, each with a seed of its own."""
    others: Positive = 1
    """Of every ablation: the first so many of the baseline's, so that runs are pairs."""
    confirm: Positive = 2
    """Of a winner and the baseline once more, seeds that did not choose it: only what they show too is adopted."""

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.others > self.baseline:
            raise ValueError(f"others {self.others} is more than baseline {self.baseline}: a seed that the baseline lacks has no pair")
        return self


def check_ablations(ablations: Sequence[Ablation], model: ModelSettings, base: Base) -> None:
    """Each names a setting that exists in the base recipe, and changes it to what it can be. Raises ValueError."""
    recipe = {"model": model.model_dump(mode="json")} | base.model_dump(mode="json")
    for ablation in ablations:
        where = f"ablations: {ablation.name}"
        try:
            changed = fitted(with_changes(recipe, ablation.change))
        except UnknownPathError as error:
            known = ", ".join(flatten(recipe))
            raise ValueError(f"{where}: no setting {ablation.path!r}; there are: {known}") from error
        if changed == fitted(recipe):
            raise ValueError(f"{where}: {ablation.path} is {ablation.value!r} in the base already")
        if isinstance(ablation.value, dict) and value_at(recipe, ablation.path) is not None:
            raise ValueError(f"{where}: the base has {ablation.path} already; change one of its keys, as {ablation.path}.KEY")
        try:
            Recipe.model_validate({"name": ablation.name, "output": "output", "shards": "shards"} | changed)
        except ValidationError as error:
            raise ValueError(f"{where}: {explain(error, Recipe)}") from error


def baseline_recipe(model: ModelSettings, base: Base, seed: int, changes: Mapping[str, Any]) -> Recipe:
    """The base recipe with `changes`, as ablations are compared with it; `seed` is added to its own."""
    return base_recipe(model, base, f"ablation-{BASELINE}{_seeded(seed)}", "ablations", {**changes, **_compared(base, seed)})


def ablation_recipe(model: ModelSettings, base: Base, ablation: Ablation, seed: int, changes: Mapping[str, Any]) -> Recipe:
    """The baseline of the same seed with the ablation's one change."""
    name = f"ablation-{ablation.name}{_seeded(seed)}"
    return base_recipe(model, base, name, "ablations", {**changes, **_compared(base, seed), **ablation.change})


def _compared(base: Base, seed: int) -> Values:
    """What all runs of a comparison have; that one diverges is a result."""
    return {"run.seed": base.run.seed + seed, "run.on_divergence": "end"}


def _seeded(seed: int) -> str:
    return f"-seed{seed}" if seed else ""


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
