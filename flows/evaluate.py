"""Phase 5: evaluation of the final model in its three modes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from flows.precompute import PRECOMPUTE, SHARDS
from flows.train import TRAIN, last_stage
from fvlm_core.eval.external_files import check_external_files, quick_digest
from fvlm_core.eval.results import EvalReport
from fvlm_core.eval.results import Results as EvalResults
from fvlm_core.eval.tables import headline_table
from fvlm_core.tables import Table
from tasks.config import PipelineConfig
from tasks.phase import EarlierResults, Phase, Results, Shown
from tasks.phase_flow import flow_on_demand
from tasks.steps import ExternalInput, Given, Step

EVALUATION = "evaluation"


def steps(config: PipelineConfig, before: EarlierResults) -> list[Step]:
    inputs: dict[str, Given] = {"run": before.step(TRAIN.name, last_stage(config)), "shards": before.step(PRECOMPUTE.name, SHARDS)}
    inputs |= {
        f"{part}.{setting}": ExternalInput(path, quick_digest(path)) for (part, setting), path in config.evaluation.outside().items()
    }
    step = Step.of(EVALUATION, "fvlm_core.eval", config.evaluation, inputs=inputs, threads=config.evaluation.threads)
    # only benchmarks are split over ranks, and a small one is done before a second process has started
    several = config.machine.ranks > 1 and bool(config.evaluation.benchmarks.data)
    return [replace(step, ranks=config.machine.ranks) if several else step]


def show(config: PipelineConfig, results: Results) -> Shown:
    folder = results.made[EVALUATION].folder
    found, report = EvalResults.read(results.folder(EVALUATION)), EvalReport.read(results.folder(EVALUATION))
    verdict = Table(head=["Does looking help?"], rows=[[report.verdict]])
    return Shown(
        table=report.headline,
        text=f"**{report.verdict}** All numbers: `{folder}`.",
        figures=[figure.model_copy(update={"file": f"{folder}/{figure.file}"}) for figure in found.figures()],
        closing=[verdict, headline_table(found.headline(), compact=True)],
    )


def prepare(config: PipelineConfig, volume: Path) -> None:
    """Check that the files of the benchmarks exist."""
    check_external_files(config.evaluation)


def outside(config: PipelineConfig, volume: Path) -> Mapping[str, str]:
    """Digests of the benchmarks' files."""
    return {f"{part}.{setting}": quick_digest(path) for (part, setting), path in config.evaluation.outside().items()}


EVALUATE = Phase(
    name="evaluate",
    purpose="Measure every part of the evaluation (fvlm_core.eval.parts) of the last stage's model.",
    pool="gpu",
    after=(PRECOMPUTE, TRAIN),
    reads=("evaluation",),
    steps=steps,
    show=show,
    prepare=prepare,
    outside=outside,
)
__getattr__ = flow_on_demand(EVALUATE, __name__)
