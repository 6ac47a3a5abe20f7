"""Phase 2: runs that differ from the base recipe in one setting each, and the one that wins."""

from flows.precompute import PRECOMPUTE, training_inputs
from flows.speed import SPEED
from flows.training import training
from fvlm_core.scaling.jobs import AblationReport
from fvlm_core.tables import Table
from tasks.config import PipelineConfig
from tasks.phase import Before, Changes, Phase, Results, Shown
from tasks.phase_flow import phase_flow
from tasks.recipes import ablation_recipe, base_recipe
from tasks.steps import Step

BASELINE = "baseline"
"""Name of the table's first run: the base recipe itself."""
REPORT = "ablation-report"
COLUMNS = {"name", "change", "value", "loss", "delta", "control"}


def steps(config: PipelineConfig, before: Before) -> list[Step]:
    inputs = training_inputs(before)
    recipes = {BASELINE: base_recipe(config, f"ablation-{BASELINE}", "ablations", before.changes)}
    recipes |= {one.name: ablation_recipe(config, one, before.changes) for one in config.ablations}
    runs = [training(recipe, config.machine, inputs, shared=True) for recipe in recipes.values()]
    values = [{"name": BASELINE, "run": None}]
    values += [
        {"name": one.name, "change": one.path, "value": one.change[one.path], "control": one.control, "run": None} for one in config.ablations
    ]
    report = Step(
        REPORT,
        "fvlm_core.scaling.ablations",
        settings={"baseline": BASELINE, "runs": values, "min_gain": config.ablation_min_gain},
        inputs={f"runs.{number}.run": run for number, run in enumerate(runs)},
    )
    return [*runs, report]


def decide(config: PipelineConfig, results: Results) -> Changes:
    """The winner's change."""
    report = AblationReport.read(results.folder(REPORT))
    return {report.winner_change: report.winner_value} if report.winner_change else {}


def show(config: PipelineConfig, results: Results) -> Shown:
    report = AblationReport.read(results.folder(REPORT))
    change = f"`{report.winner_change}` = `{report.winner_value}`" if report.winner_change else "the base recipe as it is"
    table = Table.of([row.model_dump(mode="json", include=COLUMNS) for row in report.rows])
    winner = [number for number, row in enumerate(report.rows) if row.name == report.winner]
    return Shown(
        table=table.model_copy(update={"marked": winner}),
        text=f"Every run differs from the baseline in one setting. Winner: **{report.winner}** ({change}).",
        pictures=results.pictures(REPORT, {"ablations.png": "Validation loss of every run minus the baseline's: left is better."}),
    )


ABLATIONS = Phase(
    name="ablations",
    purpose="Train the base recipe and every ablation for the same samples, compare them on the same validation set, pick the winner.",
    pool="gpu",
    after=(PRECOMPUTE, SPEED),
    reads=("model", "base", "ablations", "ablation_min_gain"),
    steps=steps,
    decide=decide,
    show=show,
)
ablations = phase_flow(ABLATIONS, __name__)
