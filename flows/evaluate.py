"""Phase 5: the final model in its three modes."""

from flows.precompute import PRECOMPUTE, SHARDS
from flows.train import TRAIN, last_stage
from fvlm_core.eval.results import EvalReport
from fvlm_core.tables import Table
from tasks.config import PipelineConfig
from tasks.phase import Before, Phase, Results, Shown
from tasks.phase_flow import phase_flow
from tasks.steps import Step

EVALUATION = "evaluation"


def steps(config: PipelineConfig, before: Before) -> list[Step]:
    inputs = {"run": before.step(TRAIN.name, last_stage(config)), "shards": before.step(PRECOMPUTE.name, SHARDS)}
    return [Step.of(EVALUATION, "fvlm_core.eval", config.evaluation, inputs=inputs, threads=config.evaluation.threads)]


def show(config: PipelineConfig, results: Results) -> Shown:
    report = EvalReport.read(results.folder(EVALUATION))
    table = Table.of([{"mode": mode, **line.model_dump(mode="json")} for mode, line in report.headline.items()])
    return Shown(
        table=table,
        text=f"All numbers with their intervals: `{results.made[EVALUATION].folder}`.",
        pictures=results.pictures(EVALUATION),
        closing=[table],
    )


EVALUATE = Phase(
    name="evaluate",
    purpose="Measure losses, captions, multiple choice, question order, gaze and latency of the last stage's model.",
    pool="gpu",
    after=(PRECOMPUTE, TRAIN),
    reads=("evaluation",),
    steps=steps,
    show=show,
)
evaluate = phase_flow(EVALUATE, __name__)
