"""Phase 3: the scaling grid, its fits and plots, and the size to train."""

from prefect import flow

from fvlm_core.scaling.jobs import VARIANTS, ScalingReport, Variant
from tasks import jobs
from tasks.config import PipelineConfig, Size
from tasks.phase_run import PhaseRun
from tasks.recipes import grid_recipe


@flow(name="scaling", flow_run_name="{config.name} · scaling")
def scaling(config: PipelineConfig, volume: str) -> None:
    """Train every size at every FLOP budget, foveated and as the baseline; fit power laws and choose the size.

    Args:
        config: What every phase does.
        volume: Folder that holds all results (an absolute path).
    """
    cells: list[tuple[Size, float, Variant]] = [
        (size, budget, variant) for size in config.scaling.sizes for budget in config.scaling.budgets_flops for variant in VARIANTS
    ]
    with PhaseRun("scaling", config, volume, steps=len(cells) + 1) as run:
        inputs = jobs.training_inputs(run.upstream["precompute"])
        recipes = [grid_recipe(config, size, budget, variant=variant, changes=run.chosen()) for size, budget, variant in cells]
        made = run.make_all([jobs.training(recipe, inputs, ranks=config.machine.shared_ranks) for recipe in recipes])
        runs = {recipe.name: (*cell, made[recipe.name]) for recipe, cell in zip(recipes, cells, strict=True)}
        fitted = run.make(jobs.scaling_report(config, runs))
        report = ScalingReport.read(run.volume / fitted.folder)
        llm = next(size.llm for size in config.scaling.sizes if size.name == report.chosen)
        columns = {"size", "variant", "budget_flops", "params", "samples", "loss"}
        run.finish(
            [point.model_dump(mode="json", include=columns) for point in report.points],
            text=f"Chosen size: **{report.chosen}**. {report.chosen_reason}",
            chosen={"model.llm": llm.model_dump(mode="json")},
            pictures=jobs.pictures(run.volume, fitted),
        )
