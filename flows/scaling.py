"""Phase 3: the scaling grid, its fits and plots, and the choice of the size to train."""

from flows.ablations import ABLATIONS
from flows.precompute import PRECOMPUTE, training_inputs
from flows.speed import SPEED
from flows.training import training
from fvlm_core.experiments import Experiment
from fvlm_core.scaling.jobs import ScalingReport
from fvlm_core.tables import Table
from tasks.config import PipelineConfig
from tasks.grid import planned
from tasks.phase import Changes, EarlierResults, Phase, Results, Shown
from tasks.phase_flow import flow_on_demand
from tasks.steps import Step, StepResult

REPORT = "scaling-report"
COLUMNS = {"size", "variant", "budget_flops", "seed", "params", "samples", "loss"}


def steps(config: PipelineConfig, before: EarlierResults) -> list[Step]:
    scaling, inputs = config.scaling, training_inputs(before)
    shards = inputs["shards"]
    plans = planned(config.grid, before.changes, before.volume / shards.folder if isinstance(shards, StepResult) else None)
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
    """The language model of the chosen size."""
    trained = trained_size(config, ScalingReport.read(results.folder(REPORT)))
    return {"model.llm": next(size.llm for size in config.scaling.sizes if size.name == trained).model_dump(mode="json")}


def trained_size(config: PipelineConfig, report: ScalingReport) -> str:
    """Name of the size to train: the best one, or the profile's `undecided` if the best is not clearly ahead or the noise is unknown."""
    scaling = config.scaling
    unsure = report.wins_share is None or report.wins_share < scaling.decided
    return scaling.undecided if scaling.undecided is not None and unsure else report.chosen


def show(config: PipelineConfig, results: Results) -> Shown:
    report = ScalingReport.read(results.folder(REPORT))
    return Shown(
        table=Table.of([point.model_dump(mode="json", include=COLUMNS) for point in report.points]),
        text=f"Best size: **{report.chosen}**: {report.chosen_reason}. Trained: **{trained_size(config, report)}**.",
        figures=results.figures(REPORT, ScalingReport),
    )


def learn(config: PipelineConfig, results: Results) -> list[Experiment]:
    report = ScalingReport.read(results.folder(REPORT))
    runs = [
        Experiment(
            run=point.run_id,
            hypothesis="its loss follows from parameters and labelled tokens",
            change=f"{point.params:,} parameters, {point.tokens:,} tokens, seed {point.seed}",
            result=f"{point.loss:.4f} nats (n=1)",
            verdict="a point of the fits",
        )
        for point in report.points
    ]
    sure = "not resampled" if report.wins_share is None else f"ahead of {report.runner_up} in {report.wins_share:.0%} of resamples"
    choice = Experiment(
        run="choice of the size",
        hypothesis="the fits say which size is best at the final budget",
        change=f"{len(report.points)} runs",
        result=report.chosen_reason,
        verdict=f"{report.chosen}, {sure}; trained: {trained_size(config, report)}",
    )
    return [*runs, choice]


SCALING = Phase(
    name="scaling",
    purpose="Train sizes at FLOP budgets, foveated and as the baseline; fit power laws and choose the size.",
    pool="gpu",
    after=(PRECOMPUTE, SPEED, ABLATIONS),
    reads=("model", "base", "scaling"),
    steps=steps,
    decide=decide,
    show=show,
    learn=learn,
)
__getattr__ = flow_on_demand(SCALING, __name__)
