"""The step for a training run, used by every phase that trains."""

from fvlm_core.config import Recipe
from tasks.machine import Machine
from tasks.steps import Given, Step


def training(recipe: Recipe, machine: Machine, inputs: dict[str, Given], *, shared: bool = False) -> Step:
    """The torchrun job of a recipe, with `inputs` by recipe setting. `shared`: the run shares the machine with others."""
    return Step(
        name=recipe.name,
        module="fvlm_core.train",
        settings=recipe.model_dump(mode="json", exclude={"output"}),
        inputs=inputs,
        ranks=machine.shared_ranks if shared else machine.ranks,
        nodes=1 if shared else machine.nodes,
        rendezvous=None if shared else machine.rendezvous,
        threads=recipe.run.threads,
    )
