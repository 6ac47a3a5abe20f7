"""The example recipes are valid, and a stage goes on from the model of the one before it."""

from pathlib import Path

import pytest

from fvlm_core.config import Recipe
from fvlm_core.train.schedules import learning_rates

FOLDER = Path(__file__).parents[2] / "deployments" / "recipes"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_example_recipe(path: Path) -> None:
    recipe = Recipe.from_yaml(path)
    assert recipe.run.steps
    assert learning_rates(recipe.optimizer, 0, recipe.run.steps)["connector"] > 0
    if recipe.init_from:
        before = Recipe.from_yaml(FOLDER / f"{recipe.init_from.name}.yaml")
        assert (before.output, before.model) == (recipe.init_from, recipe.model)
