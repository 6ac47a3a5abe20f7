"""`fvlm data plan`: show what a run will train on."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fvlm_core.errors import UserError

LOOKED_AT = 200
"""Number of steps whose load is computed."""


def plan(
    recipe: Path,
    /,
    *,
    ranks: Annotated[int, Parameter(help="Number of ranks of the run.")] = 1,
    steps: Annotated[int | None, Parameter(help="Number of steps; by default the recipe's.")] = None,
    show: Annotated[int, Parameter(help="Number of first steps whose micro-batches are listed.")] = 2,
) -> int:
    """Show what a recipe's run will train on: shares and epochs of each source, micro-batches, and the load balance of the ranks.

    Parameters
    ----------
    recipe
        YAML file of a recipe; `fvlm recipe STAGE` prints one.
    """
    from deployments.options import table_console
    from fvlm_core.config import Recipe
    from fvlm_core.data.plan import Plan
    from fvlm_core.data.plan_tables import plan_tables
    from fvlm_core.data.shard_set import ShardSet

    asked = Recipe.from_yaml(recipe)
    length = steps or asked.run.steps
    if length is None:
        raise UserError("the recipe has a budget of FLOPs and no number of steps", where=f"{recipe}, run", fix="give --steps")
    run = asked.run.with_changes({"steps": length, "budget_flops": None})
    made = Plan(ShardSet(asked.shards), asked.data, run, tokens_per_frame=asked.model.tokens_per_frame, world_size=ranks)
    for table in plan_tables(made, steps=length, looked_at=LOOKED_AT, shown=show):
        table_console().print(table.terminal())
    return 0
