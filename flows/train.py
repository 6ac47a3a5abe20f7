"""Phase 4: the stages of the final training, with the winning configuration at the chosen size."""

from flows.ablations import ABLATIONS
from flows.precompute import PRECOMPUTE, training_inputs
from flows.scaling import SCALING
from flows.speed import SPEED
from flows.training import training
from fvlm_core.experiments import Experiment
from fvlm_core.scaling.jobs import CurvesManifest
from fvlm_core.tables import Table
from fvlm_core.train.jobs import RunManifest
from tasks.config import PipelineConfig
from tasks.phase import EarlierResults, Phase, Results, Shown
from tasks.phase_flow import flow_on_demand
from tasks.recipes import stage_recipe
from tasks.steps import Step

CURVES = "curves"


def steps(config: PipelineConfig, before: EarlierResults) -> list[Step]:
    stages: list[Step] = []
    for name in config.stages.present:
        recipe = stage_recipe(config.model, config.base, config.stages, name, changes=before.changes, start=bool(stages))
        start = {"init_from": stages[-1]} if stages else {}
        stages.append(training(recipe, config.machine, training_inputs(before) | start))
    runs = {f"runs.{stage.name}": stage for stage in stages}
    curves = Step(CURVES, "fvlm_core.scaling.curves", settings={"runs": dict.fromkeys(config.stages.present)}, inputs=runs)
    return [*stages, curves]


def last_stage(config: PipelineConfig) -> str:
    """Name of the stage whose model is evaluated and released."""
    return list(config.stages.present)[-1]


def show(config: PipelineConfig, results: Results) -> Shown:
    rows = []
    for name in config.stages.present:
        run = RunManifest.read(results.folder(name))
        held = {"steps": run.steps, "model_step": run.model_step, "samples": run.samples_seen, "loss": run.final_loss}
        rows.append({"stage": name, **held, **run.losses})
    return Shown(
        table=Table.of(rows),
        text="Validation losses of each stage's model, by pass: of its best step, or its last where the recipe says so.",
        figures=results.figures(CURVES, CurvesManifest),
    )


def learn(config: PipelineConfig, results: Results) -> list[Experiment]:
    entries = []
    for name in config.stages.present:
        run = RunManifest.read(results.folder(name))
        diverged = f"diverged {len(run.divergences)} times" if run.divergences else "trained to its end"
        said = f"{run.final_loss:.4f} nats (n=1) at step {run.model_step} of {run.steps}"
        expected = "the winning configuration at the chosen size learns this stage's data"
        entries.append(Experiment(run=name, hypothesis=expected, change=f"{run.samples_seen:,} samples", result=said, verdict=diverged))
    return entries


TRAIN = Phase(
    name="train",
    purpose="Train the stages one after another, each from the previous stage's model.",
    pool="gpu",
    after=(PRECOMPUTE, SPEED, ABLATIONS, SCALING),
    reads=("model", "base", "stages"),
    steps=steps,
    show=show,
    learn=learn,
)
__getattr__ = flow_on_demand(TRAIN, __name__)
