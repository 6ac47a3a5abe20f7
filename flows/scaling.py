"""Phase 3: the scaling grid, its fits and plots, and the size to train."""

from flows.ablations import ABLATIONS
from flows.precompute import PRECOMPUTE, training_inputs
from flows.speed import SPEED
from flows.training import training
from fvlm_core.scaling.jobs import ScalingReport
from fvlm_core.tables import Table
from tasks.config import PipelineConfig
from tasks.grid import planned
from tasks.phase import Before, Changes, Phase, Results, Shown
from tasks.phase_flow import phase_flow
from tasks.steps import Made, Step

REPORT = "scaling-report"
COLUMNS = {"size", "variant", "budget_flops", "seed", "params", "samples", "loss"}


def steps(config: PipelineConfig, before: Before) -> list[Step]:
    scaling, inputs = config.scaling, training_inputs(before)
    shards = inputs["shards"]
    plans = planned(config, before.changes, before.volume / shards.folder if isinstance(shards, Made) else None)
    runs = [training(one.recipe, config.machine, inputs, shared=True) for one in plans]
    values = [
        {"size": cell.size.name, "budget_flops": cell.budget_flops, "variant": cell.variant, "seed": cell.seed, "run": None}
        for cell in (one.cell for one in plans)
    ]
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
        text=f"Chosen size: **{report.chosen}**: {report.chosen_reason}.",
        figures=results.figures(REPORT, ScalingReport),
    )


SCALING = Phase(
    name="scaling",
    purpose="Train sizes at FLOP budgets, foveated and as the baseline; fit power laws and choose the size.",
    pool="gpu",
    after=(PRECOMPUTE, SPEED, ABLATIONS),
    reads=("model", "base", "scaling"),
    steps=steps,
    decide=decide,
    show=show,
)
scaling = phase_flow(SCALING, __name__)
