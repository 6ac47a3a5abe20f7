"""The runs of the scaling grid: its cells, and the recipe of each, chosen so that their losses can be compared.

A cell's loss is that of its size and data only if the run leaves warm-up, ends decayed and takes enough steps. So warm-up is a share of the
steps, the schedule must decay, and a cell with fewer steps than `scaling.min_steps` is refused: when the profile is read, based on the mean
samples that it states, and again when there are shards, based on these.

* The language model's learning rate scales with 1 / width, starting from the base model's rate: the rule of maximal update parametrization
  (muP) for hidden matrices under Adam (Yang et al. 2022, Tensor Programs V, https://arxiv.org/abs/2203.03466). Connector and encoder have
  the same width in all cells and keep their rates. This is a rule, not a sweep: a size whose best rate is known can state its `lr_scale`.
* Samples per step scale with budget^0.3271 (Bi et al. 2024, DeepSeek LLM, https://arxiv.org/abs/2401.02954, for language models trained
  from scratch), so that small budgets keep enough steps. The learning rate is not scaled with the batch size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvlm_core.config import ModelSettings, Recipe
from fvlm_core.errors import UserError
from fvlm_core.scaling.jobs import VARIANTS, Variant
from fvlm_core.tables import Table
from fvlm_core.train.expected import MeanSample, expected_cost, llm_width, patches_per_side
from tasks.recipes import Base, base_recipe
from tasks.scaling import Scaling, Size

DECAYING = ("cosine", "wsd")


@dataclass(frozen=True)
class Grid:
    """The parts of a profile that the grid's runs need."""

    scaling: Scaling
    model: ModelSettings
    base: Base
    samples: Mapping[str, MeanSample]
    """Mean sample of each source, to estimate a run's steps before there are shards."""
    vocab_size: int | None
    """Vocabulary size of the tokenizer that the profile trains; None: it trains none."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    size: Size
    budget_flops: float
    variant: Variant
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the run."""
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"grid-{self.size.name}-{self.budget_flops:.2e}-{self.variant}{seed}".replace("+", "")


def cells(scaling: Scaling) -> list[Cell]:
    """Return the grid's runs: those with the first seed, then those with further seeds at the corners."""
    budgets = {size.name: size.budgets_flops or scaling.budgets_flops for size in scaling.sizes}
    first = [Cell(size, budget, variant) for size in scaling.sizes for budget in budgets[size.name] for variant in VARIANTS]
    corners = {(size.name, budget) for size in (scaling.sizes[0], scaling.sizes[-1]) for budget in _ends(budgets[size.name])}
    return first + [
        Cell(cell.size, cell.budget_flops, cell.variant, seed)
        for cell in first
        if (cell.size.name, cell.budget_flops) in corners
        for seed in range(1, scaling.corner_seeds)
    ]


def grid_changes(grid: Grid, cell: Cell, base: Recipe) -> dict[str, Any]:
    """Return the changes of a cell to the base recipe. Raises UserError for a schedule that does not decay."""
    scaling = grid.scaling
    if base.optimizer.schedule not in DECAYING:
        raise UserError(
            f"the schedule {base.optimizer.schedule!r} does not decay, so runs of different lengths cannot be compared",
            where="base.optimizer.schedule",
            fix=f"take one of {', '.join(DECAYING)}",
        )
    largest = max(scaling.budgets_flops)
    batch = max(1, round((scaling.batch_samples or base.run.batch_samples) * (cell.budget_flops / largest) ** scaling.batch_exponent))
    pooled = {"model.query": "pooled", "model.tokens_per_frame": scaling.baseline_tokens_per_frame}
    return {
        "model.llm": cell.size.llm.model_dump(mode="json"),
        "optimizer.lr_llm": base.optimizer.lr_llm * lr_scale(grid, cell.size),
        "optimizer.warmup_steps": 0,
        "optimizer.warmup_share": scaling.warmup_share,
        "run.steps": None,
        "run.budget_flops": cell.budget_flops,
        "run.batch_samples": batch,
        **({"run.eval_every": scaling.eval_every} if scaling.eval_every else {}),
        "run.seed": base.run.seed + cell.seed,
        "run.on_divergence": "end",
        **(pooled if cell.variant == "baseline" else {}),
    }


def lr_scale(grid: Grid, size: Size) -> float:
    """Return the ratio of the language model's learning rate to the base's. Raises UserError if a width is unknown."""
    if size.lr_scale is not None:
        return size.lr_scale
    base, own = llm_width(grid.model.llm), llm_width(size.llm)
    if base is None or own is None:
        raise UserError(
            f"the width of the language model {size.llm.checkpoint or grid.model.llm.checkpoint} is not known here",
            where=f"scaling.sizes, {size.name}",
            fix="give its lr_scale, or a checkpoint whose config.json is on this machine",
        )
    return base / own


@dataclass(frozen=True)
class CellPlan:
    """A cell with its recipe and, as far as known, its number of steps."""

    cell: Cell
    recipe: Recipe
    steps: int | None
    """None if there are neither shards nor stated samples to derive it from."""


def planned(grid: Grid, changes: Mapping[str, Any], shards: Path | None = None) -> list[CellPlan]:
    """Return every cell with its recipe and steps. Raises UserError if the grid's runs cannot be compared."""
    scaling = grid.scaling
    _check_shape(grid)
    found = []
    for cell in cells(scaling):
        base = base_recipe(grid.model, grid.base, cell.name, "scaling", changes)
        recipe = base_recipe(grid.model, grid.base, cell.name, "scaling", {**changes, **grid_changes(grid, cell, base)})
        found.append(CellPlan(cell, recipe, _steps(grid, recipe, shards)))
    if few := [one for one in found if one.steps is not None and one.steps < scaling.min_steps]:
        listed = ", ".join(f"{one.cell.name} {one.steps}" for one in few[:6]) + (f" and {len(few) - 6} more" if len(few) > 6 else "")
        raise UserError(
            f"{len(few)} of {len(found)} runs of the grid have fewer than {scaling.min_steps} steps: {listed}",
            where="scaling",
            fix="leave the budget out of the size's budgets_flops, or raise it; scaling.min_steps says how few are too few",
        )
    return found


def check_grid(grid: Grid) -> None:
    """Run the checks of `planned` for a profile that is being read. Raises ValueError if one fails."""
    try:
        planned(grid, {})
    except UserError as error:
        raise ValueError(f"{error.where}: {error.what}; {error.fix}") from error


def grid_table(plans: list[CellPlan]) -> Table:
    """The grid before it runs: a row per cell."""
    rows = [
        [
            one.cell.name.removeprefix("grid-"),
            f"{one.cell.budget_flops:.2e}",
            str(one.recipe.run.batch_samples),
            "not known yet" if one.steps is None else f"{one.steps:,}",
            "" if one.steps is None else str(one.recipe.optimizer.warmup_of(one.steps)),
            f"{one.recipe.optimizer.peaks['llm']:.2e}",
        ]
        for one in plans
    ]
    note = "Every run ends decayed. Steps are of mean samples, a few percent off the run's own."
    return Table(title="Scaling grid", head=["run", "FLOPs", "samples per step", "steps", "warm-up", "LLM rate"], rows=rows, note=note)


def _check_shape(grid: Grid) -> None:
    scaling = grid.scaling
    names = [cell.name for cell in cells(scaling)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"two runs of the grid would be called {twice[0]}",
            where="scaling.budgets_flops",
            fix="give every budget once, and budgets that differ by a percent or more",
        )
    for size in scaling.sizes:
        if strangers := sorted(set(size.budgets_flops or []) - set(scaling.budgets_flops)):
            raise UserError(
                f"{', '.join(f'{budget:.2e}' for budget in strangers)} is none of the grid's budgets",
                where=f"scaling.sizes, {size.name}",
                fix=f"take some of {', '.join(f'{budget:.2e}' for budget in scaling.budgets_flops)}",
            )
    side, across = patches_per_side(grid.model.vision), round(scaling.baseline_tokens_per_frame**0.5)
    if side is not None and side % across:
        fair = [tokens for tokens in (1, 4, 9, 16) if side % round(tokens**0.5) == 0]
        raise UserError(
            f"{scaling.baseline_tokens_per_frame} tokens of {side}x{side} patches would be averages of unequal numbers of patches",
            where="scaling.baseline_tokens_per_frame",
            fix=f"take one of {', '.join(map(str, fair))}",
        )


def _steps(grid: Grid, recipe: Recipe, shards: Path | None) -> int | None:
    samples = expected_cost(recipe, shards, grid.samples, vocab_size=grid.vocab_size).samples
    return None if samples is None else samples // recipe.run.batch_samples


def _ends(budgets: list[float]) -> set[float]:
    return {min(budgets), max(budgets)}
