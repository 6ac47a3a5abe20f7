"""Phase 6: the release: the model's folder with its card, and the report of the complete pipeline."""

from typing import Any

from flows.ablations import ABLATIONS
from flows.evaluate import EVALUATE, EVALUATION
from flows.precompute import PRECOMPUTE, SHARDS
from flows.scaling import SCALING
from flows.speed import SPEED
from flows.train import TRAIN, last_stage
from fvlm_core.release.jobs import ReleaseManifest
from tasks.config import PipelineConfig
from tasks.phase import EarlierResults, Phase, Results, Shown
from tasks.phase_flow import flow_on_demand
from tasks.steps import ExternalInput, Given, Step

RELEASE_STEP = "release"


def steps(config: PipelineConfig, before: EarlierResults) -> list[Step]:
    phases = [phase.name for phase in RELEASE.after]
    stages = list(config.stages.present)
    inputs: dict[str, Given] = {
        "run": before.step(TRAIN.name, last_stage(config)),
        "evaluation": before.step(EVALUATE.name, EVALUATION),
        "shards": before.step(PRECOMPUTE.name, SHARDS),
    }
    others = {name: made for phase in phases for name, made in before.steps(phase).items() if name not in (SHARDS, EVALUATION, *stages)}
    inputs |= {f"stages.{name}": before.step(TRAIN.name, name) for name in stages}
    inputs |= {f"reports.{name}": made for name, made in others.items()}
    # no digest: the report shows the phases' times, which are not part of the release's identity
    inputs |= {f"phases.{name}": ExternalInput(before.folders[name], "") for name in phases}
    places: dict[str, Any] = {"stages": dict.fromkeys(stages), "reports": dict.fromkeys(others), "phases": dict.fromkeys(phases)}
    return [Step.of(RELEASE_STEP, "fvlm_core.release", config.release, inputs=inputs, profile=config.name, **places)]


def show(config: PipelineConfig, results: Results) -> Shown:
    report = ReleaseManifest.read(results.folder(RELEASE_STEP))
    folder = results.made[RELEASE_STEP].folder
    return Shown(text=report.verdict, outputs={what: f"{folder}/{path}" for what, path in report.outputs.items()})


RELEASE = Phase(
    name="release",
    purpose="Package the final model, verify it in a clean process, and write the report.",
    pool="cpu",
    after=(PRECOMPUTE, SPEED, ABLATIONS, SCALING, TRAIN, EVALUATE),
    reads=("release",),
    steps=steps,
    show=show,
    links={"release": RELEASE_STEP},
)
__getattr__ = flow_on_demand(RELEASE, __name__)
