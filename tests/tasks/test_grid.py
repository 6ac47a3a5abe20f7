"""The grid's design: every run leaves warm-up, ends decayed and has steps enough, or it is refused before anything starts."""

from typing import Any

import pytest

from deployments.checks import load_profile
from fvlm_core.errors import UserError
from fvlm_core.train.schedules import learning_rates
from tasks.config import PipelineConfig
from tasks.grid import cells, grid_table, planned
from tests.tiny import profile_values

SAMPLES = {name: {"frames": 3, "tokens": 34, "answer_tokens": 4} for name in ("gaze_caption", "natural", "gaze_cell", "text")}


def config(**scaling: Any) -> PipelineConfig:
    values = profile_values()
    values["scaling"] |= {"samples": SAMPLES, "budgets_flops": [1e9, 8e9]} | scaling
    return PipelineConfig.from_values(values, where="the tests' profile")


@pytest.mark.parametrize("profile", ["laptop", "runpod"])
def test_every_run_leaves_warm_up_and_ends_decayed(profile: str) -> None:
    loaded = load_profile(profile)
    for one in planned(loaded.grid, {}):
        assert one.steps is not None
        assert one.steps >= loaded.scaling.min_steps
        optimizer = one.recipe.optimizer
        rates = [learning_rates(optimizer, step, one.steps)["llm"] for step in range(one.steps)]
        assert max(rates) == pytest.approx(optimizer.peaks["llm"])
        assert rates.index(max(rates)) < 0.2 * one.steps
        assert rates[-1] < 0.1 * max(rates)


def test_rates_go_with_the_width_and_batches_with_the_budget() -> None:
    found = {one.cell.name: one.recipe for one in planned(config(min_steps=1).grid, {})}
    small, base = found["grid-small-8.00e09-foveated"], found["grid-base-8.00e09-foveated"]
    assert small.optimizer.lr_llm == pytest.approx(base.optimizer.lr_llm * 48 / 32)
    assert small.optimizer.lr_connector == base.optimizer.lr_connector
    assert (base.run.batch_samples, found["grid-base-1.00e09-foveated"].run.batch_samples) == (8, round(8 * (1 / 8) ** 0.3271))
    stated = config(min_steps=1, sizes=[{**config().scaling.sizes[0].model_dump(mode="json"), "lr_scale": 0.25}])
    assert planned(stated.grid, {})[0].recipe.optimizer.lr_llm == pytest.approx(base.optimizer.lr_llm / 4)


def test_corners_have_several_seeds() -> None:
    found = cells(config(min_steps=1, corner_seeds=3).scaling)
    assert len(found) == 8 + 8 * 2
    assert len({cell.name for cell in found}) == len(found)
    again = [one for one in planned(config(min_steps=1, corner_seeds=3).grid, {}) if one.cell.seed == 2]
    assert {one.recipe.run.seed for one in again} == {2}


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"budgets_flops": [1e6, 8e9]}, "runs of the grid have fewer than"),
        ({"min_steps": 10_000}, "8 of 8 runs of the grid have fewer than 10000 steps"),
        ({"baseline_tokens_per_frame": 16}, "16 tokens of 3x3 patches would be averages of unequal numbers"),
        ({"baseline_tokens_per_frame": 4}, "take one of 1, 9"),
        ({"budgets_flops": [8e9, 8e9]}, "two runs of the grid would be called grid-"),
        ({"budgets_flops": [8e9, 8.001e9]}, "budgets that differ by a percent"),
    ],
)
def test_a_grid_that_cannot_be_compared_is_refused(scaling: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config(**scaling)


def test_a_budget_that_the_grid_does_not_have_is_refused() -> None:
    sizes = [one.model_dump(mode="json") for one in config().scaling.sizes]
    with pytest.raises(UserError, match=r"2\.00e\+09 is none of the grid's budgets"):
        config(sizes=[sizes[0] | {"budgets_flops": [2e9]}, sizes[1]])


def test_a_schedule_that_does_not_decay_is_refused() -> None:
    values = profile_values()
    values["base"]["optimizer"]["schedule"] = "constant"
    with pytest.raises(UserError, match="'constant' does not decay"):
        PipelineConfig.from_values(values, where="the tests' profile")


def test_the_grid_is_shown_before_it_runs() -> None:
    table = grid_table(planned(config(min_steps=1).grid, {}))
    assert len(table.rows) == 8
    assert table.rows[0][0] == "small-1.00e09-foveated"
    assert all(row[3].replace(",", "").isdecimal() for row in table.rows)
