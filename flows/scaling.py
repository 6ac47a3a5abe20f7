"""Phase 3: the scaling grid, its fits and plots, and the size to train."""

from flows.ablations import ABLATIONS
from flows.precompute import PRECOMPUTE, training_inputs
from flows.speed import SPEED
from flows.training import training
from fvlm_core.scaling.jobs import VARIANTS, ScalingReport, Variant
from fvlm_core.tables import Table
from tasks.config import PipelineConfig, Size
from tasks.phase import Before, Changes, Phase, Results, Shown
from tasks.phase_flow import phase_flow
from tasks.recipes import grid_recipe
from tasks.steps import Step

REPORT = "scaling-report"
COLUMNS = {"size", "variant", "budget_flops", "params", "samples", "loss"}


def steps(config: PipelineConfig, before: Before) -> list[Step]:
    scaling, inputs = config.scaling, training_inputs(before)
    cells: list[tuple[Size, float, Variant]] = [
        (size, budget, variant) for size in scaling.sizes for budget in scaling.budgets_flops for variant in VARIANTS
    ]
    recipes = [grid_recipe(config, size, budget, variant=variant, changes=before.changes) for size, budget, variant in cells]
    runs = [training(recipe, config.machine, inputs, shared=True) for recipe in recipes]
    values = [{"size": size.name, "budget_flops": budget, "variant": variant, "run": None} for size, budget, variant in cells]
    report = Step(
        REPORT,
        "fvlm_core.scaling.grid",
        settings={"runs": values, "target_flops": scaling.target_flops, "weights": scaling.weights},
        inputs={f"runs.{number}.run": run for number, run in enumerate(runs)},
    )
    return [*runs, report]


def decide(config: PipelineConfig, results: Results) -> Changes:
    """The language model to train."""
    chosen = ScalingReport.read(results.folder(REPORT)).chosen
    return {"model.llm": next(size.llm for size in config.scaling.sizes if size.name == chosen).model_dump(mode="json")}


def show(config: PipelineConfig, results: Results) -> Shown:
    report = ScalingReport.read(results.folder(REPORT))
    return Shown(
        table=Table.of([point.model_dump(mode="json", include=COLUMNS) for point in report.points]),
        text=f"Chosen size: **{report.chosen}**. {report.chosen_reason}",
        figures=results.figures(REPORT, ScalingReport),
    )


SCALING = Phase(
    name="scaling",
    purpose="Train every size at every FLOP budget, foveated and as the baseline; fit power laws and choose the size.",
    pool="gpu",
    after=(PRECOMPUTE, SPEED, ABLATIONS),
    reads=("model", "base", "scaling"),
    steps=steps,
    decide=decide,
    show=show,
)
scaling = phase_flow(SCALING, __name__)
