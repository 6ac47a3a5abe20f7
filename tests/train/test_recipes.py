"""The example recipe is valid, and so are those that `fvlm recipe` prints of every profile's stages."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from deployments.checks import load_profile
from fvlm_core.config import Recipe
from fvlm_core.dotted import differences
from fvlm_core.errors import UserError
from fvlm_core.train.distributed import World
from fvlm_core.train.loop import Trainer
from fvlm_core.train.schedules import learning_rates
from tasks.ablations import baseline_recipe
from tests.train.conftest import tiny_recipe

RECIPES = Path(__file__).parents[2] / "deployments" / "recipes"
EXAMPLE = RECIPES / "tiny.yaml"
PLACES = {"name", "output", "shards"}


def test_the_example_recipe() -> None:
    recipe = Recipe.from_yaml(EXAMPLE)
    assert recipe.run.steps
    assert learning_rates(recipe.optimizer, 0, recipe.run.steps)["connector"] > 0


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("glance_all", set()),
        (
            "glance_chosen",
            {"init_from", "run.steps", *(f"optimizer.{key}" for key in ("lr_connector", "lr_llm", "lr_vision", "warmup_steps"))},
        ),
    ],
)
def test_the_glance_recipes_differ_from_the_production_baseline_in_the_glance_alone(name: str, own: set[str]) -> None:
    config = load_profile("runpod")
    baseline = baseline_recipe(config.model, config.base, 0, {}).model_dump(mode="json")
    recipe = Recipe.from_yaml(RECIPES / f"{name}.yaml").model_dump(mode="json")
    found = {path for path in differences(baseline, recipe) if not path.startswith("model.glance")}
    assert found == PLACES | own | {"run.micro_batch.frames"}  # rounding only: the glance keeps more of a frame


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_a_stages_recipe_is_printed(stage: str) -> None:
    fvlm = Path(sys.executable).with_name("fvlm")
    places = ["--output", "runs/x", "--shards", "volume/shards", "--init-from", "runs/before"]
    command = [fvlm, "recipe", stage, "--profile", "runpod", *places, "--set", f"stages.{stage}.run.steps=7"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    recipe = Recipe.model_validate(yaml.safe_load(printed))
    assert (recipe.name, recipe.run.steps, recipe.output, recipe.init_from) == (stage, 7, Path("runs/x"), Path("runs/before"))
    assert recipe.run.compile is True


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_validation_is_at_most_6_percent_of_a_rented_stage(stage: str) -> None:
    """In FLOPs: a sample's backward costs twice its forward, and validation has only forwards."""
    run = load_profile("runpod").stages.present[stage].run
    assert run.steps is not None
    evaluations = -(-run.steps // run.eval_every)
    validation, training = evaluations * run.eval_samples, 3 * run.steps * run.batch_samples
    assert validation / (validation + training) <= 0.06


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run__seed": -1}, r"run\.seed(.|\n)*greater than or equal to 0"),
        ({"optimizer__beta1": 1.0}, r"optimizer\.beta1(.|\n)*less than 1"),
        ({"model__vision__shape__heads": 3}, "heads 3 do not divide width 16"),
        ({"model__llm__shape__heads": 5}, "width 24 / heads 5 is not an even integer"),
        ({"model__llm__shape__heads": 8}, "width 24 / heads 8 is not an even integer"),
        ({"model__llm__shape__heads": 3, "model__llm__shape__kv_heads": 2}, "kv_heads 2 do not divide heads 3"),
        ({"optimizer__schedule": "converging", "optimizer__lr_vision": 0, "optimizer__lr_llm": 0}, "'converging' needs a learning rate"),
    ],
)
def test_what_cannot_be_trained_is_refused_when_the_recipe_is_read(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_recipe(tmp_path / "run", tmp_path / "shards", **changes)


def test_a_validation_set_that_the_shards_lack_is_refused_before_the_first_step(tmp_path: Path, shards: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", shards, data__validation={"mixture": [{"source": "openvid", "share": 1.0}]})
    with pytest.raises(UserError, match="no val samples of 'openvid'") as caught:
        Trainer(recipe, World(0, 1, torch.device("cpu")), "test", {}, has_wandb_key=False)
    assert caught.value.where == f"data.validation.mixture, shards {shards}"
