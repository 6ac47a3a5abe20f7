"""A run of an ablation is the baseline's but for its one setting, or the one group of settings that it switches on."""

import re
from typing import Any

import pytest

from deployments.checks import load_profile
from fvlm_core.dotted import flatten
from fvlm_core.errors import UserError
from tasks.ablations import ablation_recipe, baseline_recipe
from tasks.config import PipelineConfig
from tasks.grid import planned
from tasks.recipes import stage_recipe
from tests.tiny import changed, profile_values

TESTS: dict[str, Any] = profile_values()
GLANCE = {"name": "glance", "hypothesis": "what is not read need not be encoded", "path": "model.glance"}


def config(values: dict[str, Any]) -> PipelineConfig:
    return PipelineConfig.from_values(values, where="the tests' profile")


def test_every_ablation_differs_from_the_base_in_its_one_setting_and_what_follows_from_it() -> None:
    loaded = load_profile("laptop")
    follows = {"model.fine_iterations": {"loss.fine"}, "model.query": {"model.fine_iterations", "loss.fine"}}
    base = flatten(baseline_recipe(loaded.model, loaded.base, 1, {}).model_dump(mode="json") | {"name": "x"})
    for ablation in loaded.ablations:
        recipe = flatten(ablation_recipe(loaded.model, loaded.base, ablation, 1, {}).model_dump(mode="json") | {"name": "x"})
        differing = {path for path in base if base[path] != recipe[path]}
        assert ablation.path in differing
        assert differing - {ablation.path} <= follows.get(ablation.path, set()), ablation.name


def test_an_ablation_can_switch_a_group_on_and_later_phases_take_it() -> None:
    """A glance is one change; where it wins, the pooled baseline of the grid, which has no queries, goes without."""
    frame_px = TESTS["model"]["vision"]["frame_px"]
    group = {"px": frame_px // 3, "zoom": 3, "open": 2, "explore": 1.0}
    loaded = config(changed("ablations", [*TESTS["ablations"], GLANCE | {"value": group}]))
    one = loaded.ablations[-1]
    assert PipelineConfig.model_validate(loaded.model_dump(mode="json")) == loaded
    recipe = ablation_recipe(loaded.model, loaded.base, one, 1, {})
    base = baseline_recipe(loaded.model, loaded.base, 1, {})
    assert recipe.model.glance is not None
    assert (recipe.model.glance.px, recipe.model.glance.zoom, recipe.model.glance.open) == (frame_px // 3, 3, 2)
    assert recipe.with_changes({"model.glance": None, "name": base.name}) == base
    models = [part.recipe.model for part in planned(loaded.grid, one.change)]
    assert {model.query: model.glance is None for model in models} == {"deep": False, "pooled": True}
    parts = (loaded.model, loaded.base, loaded.stages)
    assert all(stage_recipe(*parts, stage, changes=one.change, start=False).model.glance for stage in loaded.stages.present)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"px": 5}, "not glance.px x its zooms"),
        ({"zooom": 3}, "unknown key 'model.glance.zooom'"),
        ({"px": {"a": 1}}, "ablations.0.value"),
    ],
)
def test_a_group_that_does_not_fit_is_refused(value: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        config(changed("ablations", [GLANCE | {"value": value}]))


def test_of_a_group_that_is_there_an_ablation_changes_one_key() -> None:
    frame_px = TESTS["model"]["vision"]["frame_px"]
    values = changed("model.glance", {"px": frame_px // 3, "zoom": 3})
    values["ablations"] = [GLANCE | {"path": "model.glance.open", "value": 2}]
    loaded = config(values)
    glance = ablation_recipe(loaded.model, loaded.base, loaded.ablations[0], 0, {}).model.glance
    assert glance is not None
    assert (glance.open, glance.px) == (2, frame_px // 3)
    values["ablations"] = [GLANCE | {"value": {"px": frame_px // 3, "zoom": 3, "open": 2, "explore": 0.5}}]
    with pytest.raises(UserError, match="change one of its keys"):
        config(values)
