"""Recipes of stages: what earlier phases decided reaches them, what follows from other settings is fitted, preferences are a stage more."""

from pathlib import Path
from typing import Any

import pytest

from flows.registry import PHASES
from fvlm_core.dotted import with_changes
from fvlm_core.errors import UserError
from tasks.config import PipelineConfig
from tasks.plan import inspect_steps
from tasks.recipes import AN_INPUT, stage_recipe, with_consistent_settings
from tests.tiny import profile_values


def config(values: dict[str, Any]) -> PipelineConfig:
    return PipelineConfig.from_values(values, where="the tests' profile")


def test_what_earlier_phases_decided_reaches_the_stages_but_not_their_data() -> None:
    profile = config(profile_values())
    size = profile.scaling.sizes[0]
    decided = {
        "run.micro_batch": {"frames": 8, "tokens": 99},
        "model.temperature": 0.5,
        "data.mixture": [{"source": "text", "share": 1.0}],
        "model.llm": size.llm.model_dump(mode="json"),
    }
    recipe = stage_recipe(profile.model, profile.base, profile.stages, "stage2", changes=decided, start=True)
    assert (recipe.run.micro_batch.tokens, recipe.model.temperature, recipe.model.llm) == (99, 0.5, size.llm)
    assert recipe.data == profile.stages.stage2.data
    assert str(recipe.init_from) == AN_INPUT


def test_settings_that_follow_from_others_are_fitted() -> None:
    values = {
        "model": {"query": "deep", "fine_iterations": 2},
        "loss": {"coarse": 0.0, "fine": [1.0, 2.0]},
    }
    assert with_consistent_settings(with_changes(values, {"model.fine_iterations": 3}))["loss"]["fine"] == [1.0, 2.0, 2.0]
    pooled = with_consistent_settings(with_changes(values, {"model.query": "pooled"}))
    assert (pooled["model"]["fine_iterations"], pooled["loss"]) == (0, {"coarse": 1.0, "fine": []})
    with pytest.raises(KeyError, match=r"model\.depth"):
        with_changes(values, {"model.depth": 1})


def test_preference_optimization_is_one_stage_more(tmp_path: Path) -> None:
    values = profile_values()
    stage = values["stages"]["stage3"] | {"dpo": {"beta": 0.2}}
    preferences = {"loss_on": "preferences", "mixture": [{"source": "pairs", "share": 1.0}]}

    def profile(**changes: Any) -> PipelineConfig:
        return config(values | {"stages": values["stages"] | {"dpo": stage | changes}})

    mine = profile(data=preferences)
    recipe = stage_recipe(mine.model, mine.base, mine.stages, "dpo", changes={}, start=True)
    assert recipe.dpo is not None
    assert (recipe.dpo.beta, recipe.phase, str(recipe.init_from)) == (0.2, "dpo", AN_INPUT)
    steps = {one.step.name: one.step for one in inspect_steps(list(PHASES.values()), mine, tmp_path)}
    assert [need.name for need in steps["dpo"].needs] == ["shards", "stage3"]
    assert "dpo" in [need.name for need in steps["evaluation"].needs], "the last stage is evaluated"
    assert "stages.dpo" in steps["release"].inputs
    without = profile()
    with pytest.raises(UserError, match="'preferences' go together"):
        stage_recipe(without.model, without.base, without.stages, "dpo", changes={}, start=True)
