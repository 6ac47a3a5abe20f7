"""Phase 2: runs that each differ from the base recipe in one setting, and the winning change."""

from flows.precompute import PRECOMPUTE, training_inputs
from flows.speed import SPEED
from flows.training import training
from fvlm_core.experiments import Experiment
from fvlm_core.scaling.jobs import AblationReport, Confirmation
from fvlm_core.scaling.tables import ablations_summary, change_text, difference_text, marked_name, show_value
from fvlm_core.tables import Table
from tasks.ablations import ablation_recipe, baseline_recipe
from tasks.config import PipelineConfig
from tasks.phase import Changes, EarlierResults, Phase, Results, Shown
from tasks.phase_flow import flow_on_demand
from tasks.steps import Step

BASELINE = "baseline"
"""Name of the table's first run, the base recipe itself."""
REPORT = "ablation-report"
CONFIRMATION = "ablation-confirmation"
COLUMNS = {"name", "change", "value", "seeds", "loss", "delta", "low", "high", "verdict", "control"}


def steps(config: PipelineConfig, before: EarlierResults) -> list[Step]:
    inputs = training_inputs(before)
    seeds, runs, values = config.ablation_seeds, [], []
    for seed in range(seeds.baseline):
        runs.append(baseline_recipe(config.model, config.base, seed, before.changes))
        values.append({"name": BASELINE, "seed": seed, "run": None})
    for one in config.ablations:
        said = {"change": one.path, "value": one.change[one.path], "hypothesis": one.hypothesis, "control": one.control}
        for seed in range(seeds.others):
            runs.append(ablation_recipe(config.model, config.base, one, seed, before.changes))
            values.append({"name": one.name, "seed": seed, "run": None} | said)
    recipes = {value["name"]: recipe for value, recipe in zip(values, runs, strict=True) if value["seed"] == 0 and not value.get("control")}
    runs = [training(recipe, config.machine, inputs, shared=True) for recipe in runs]
    limits = {"relevance": config.ablation_relevance, "min_gain": config.ablation_min_gain}
    report = Step(
        REPORT,
        "fvlm_core.scaling.ablations",
        settings={"baseline": BASELINE, "runs": values} | limits,
        inputs={f"runs.{number}.run": run for number, run in enumerate(runs)} | {"shards": inputs["shards"]},
    )
    confirmation = Step(
        CONFIRMATION,
        "fvlm_core.scaling.confirm",
        settings={
            "report": None,
            "recipes": {name: recipe.model_dump(mode="json") for name, recipe in recipes.items()},
            "seeds": [config.base.run.seed + seeds.baseline + number for number in range(seeds.confirm)],
            "min_gain": config.ablation_min_gain,
        },
        inputs={"report": report, **{path: one for name in recipes for path, one in training_inputs(before, f"recipes.{name}.").items()}},
    )
    return [*runs, report, confirmation]


def decide(config: PipelineConfig, results: Results) -> Changes:
    """The winning change, if new seeds confirmed it."""
    report, confirmation = AblationReport.read(results.folder(REPORT)), Confirmation.read(results.folder(CONFIRMATION))
    return {report.winner_change: report.winner_value} if confirmation.confirmed else {}


def show(config: PipelineConfig, results: Results) -> Shown:
    report, confirmation = AblationReport.read(results.folder(REPORT)), Confirmation.read(results.folder(CONFIRMATION))
    table = Table.of([row.model_dump(mode="json", include=COLUMNS) for row in report.rows])
    winner = [number for number, row in enumerate(report.rows) if row.name == report.winner]
    return Shown(
        table=table.model_copy(update={"marked": winner}),
        text=f"{ablations_summary(report)} {confirmation.text} Every run differs from the baseline in one setting.".replace("  ", " "),
        figures=results.figures(REPORT, AblationReport),
    )


def learn(config: PipelineConfig, results: Results) -> list[Experiment]:
    report, confirmation = AblationReport.read(results.folder(REPORT)), Confirmation.read(results.folder(CONFIRMATION))
    rows = [
        Experiment(
            run=marked_name(row),
            hypothesis=row.hypothesis or "the baseline of all other runs",
            change=change_text(row, report.baseline),
            result=f"{row.loss:.4f} nats (n={row.seeds})" + ("" if row.name == report.baseline else f", {difference_text(row)}"),
            verdict=row.verdict,
        )
        for row in report.rows
    ]
    if not confirmation.text:
        return rows
    again = Experiment(
        run=f"{report.winner}, other seeds",
        hypothesis="the gain holds on seeds that were not used to choose it",
        change=f"{report.winner_change} = {show_value(report.winner_value)}",
        result=confirmation.text,
        verdict="confirmed" if confirmation.confirmed else "not confirmed",
    )
    return [*rows, again]


ABLATIONS = Phase(
    name="ablations",
    purpose="Train the base recipe and every ablation on the same samples and seeds, compare them, and confirm the winner on other seeds.",
    pool="gpu",
    after=(PRECOMPUTE, SPEED),
    reads=("model", "base", "ablations", "ablation_seeds", "ablation_relevance", "ablation_min_gain"),
    steps=steps,
    decide=decide,
    show=show,
    learn=learn,
)
__getattr__ = flow_on_demand(ABLATIONS, __name__)
