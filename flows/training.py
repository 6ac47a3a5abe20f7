"""The step of a training run, as every phase that trains has it."""

from fvlm_core.config import Recipe
from tasks.config import Machine
from tasks.steps import Input, Step


def training(recipe: Recipe, machine: Machine, inputs: dict[str, Input | list[Input]], *, shared: bool = False) -> Step:
    """The torchrun job of a recipe; `inputs` by the recipe's settings. `shared`: one of several runs at once on the machine."""
    return Step(
        name=recipe.name,
        module="fvlm_core.train",
        settings=recipe.model_dump(mode="json", exclude={"output"}),
        identity=recipe.model_dump(mode="json", exclude={"output"}),
        inputs=inputs,
        ranks=machine.shared_ranks if shared else machine.ranks,
        threads=recipe.run.threads,
    )
