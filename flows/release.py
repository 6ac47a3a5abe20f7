"""Phase 6: the model's folder, its card and the report of the whole pipeline."""

from typing import Any

from flows.ablations import ABLATIONS
from flows.ablations import REPORT as ABLATION_REPORT
from flows.evaluate import EVALUATE, EVALUATION
from flows.precompute import PRECOMPUTE, SHARDS
from flows.scaling import REPORT as SCALING_REPORT
from flows.scaling import SCALING
from flows.speed import REPORT as SPEED_REPORT
from flows.speed import SPEED
from flows.train import TRAIN, last_stage
from fvlm_core.release.jobs import HUB_FOLDER, REPORT_HTML, ReleaseManifest
from tasks.config import PipelineConfig
from tasks.phase import Before, Phase, Results, Shown
from tasks.phase_flow import phase_flow
from tasks.steps import Input, Step

RELEASE_STEP = "release"


def steps(config: PipelineConfig, before: Before) -> list[Step]:
    stages = list(config.stages.present)
    prepared = [made for name, made in before.steps(PRECOMPUTE.name).items() if name != SHARDS]
    inputs: dict[str, Input | list[Input]] = {
        "run": before.step(TRAIN.name, last_stage(config)),
        "evaluation": before.step(EVALUATE.name, EVALUATION),
        "shards": before.step(PRECOMPUTE.name, SHARDS),
        "reports.precompute": prepared,
        "reports.speed": before.step(SPEED.name, SPEED_REPORT),
        "reports.ablations": before.step(ABLATIONS.name, ABLATION_REPORT),
        "reports.scaling": before.step(SCALING.name, SCALING_REPORT),
    }
    inputs |= {f"reports.{stage}": before.step(TRAIN.name, stage) for stage in stages}
    reports: dict[str, Any] = dict.fromkeys(("precompute", "speed", "ablations", "scaling", *stages))
    return [Step.of(RELEASE_STEP, "fvlm_core.release", config.release, inputs=inputs, profile=config.name, reports=reports)]


def show(config: PipelineConfig, results: Results) -> Shown:
    folder = results.made[RELEASE_STEP].folder
    report = ReleaseManifest.read(results.folder(RELEASE_STEP))
    return Shown(text=report.verdict, outputs={"model": f"{folder}/{HUB_FOLDER}", "report": f"{folder}/{REPORT_HTML}"})


RELEASE = Phase(
    name="release",
    purpose="Package the final model, check it in a clean process, and write the report.",
    pool="cpu",
    after=(PRECOMPUTE, SPEED, ABLATIONS, SCALING, TRAIN, EVALUATE),
    reads=("release",),
    steps=steps,
    show=show,
    links={"release": RELEASE_STEP},
)
release = phase_flow(RELEASE, __name__)
