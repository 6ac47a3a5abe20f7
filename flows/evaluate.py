"""Phase 5: the final model in its three modes."""

from prefect import flow

from fvlm_core.eval.results import EvalReport
from tasks import jobs
from tasks.config import PipelineConfig
from tasks.phase_run import PhaseRun


@flow(name="evaluate", flow_run_name="{config.name} · evaluate")
def evaluate(config: PipelineConfig, volume: str) -> None:
    """Measure losses, captions, multiple choice, question order, gaze and latency of the last stage's model.

    Args:
        config: What every phase does.
        volume: Folder that holds all results (an absolute path).
    """
    with PhaseRun("evaluate", config, volume, steps=1) as run:
        evaluated = run.make(jobs.evaluation(config, run.input("train", "stage3"), run.input("precompute", "shards")))
        report = EvalReport.read(run.volume / evaluated.folder)
        run.finish(
            [{"mode": mode, **line.model_dump(mode="json")} for mode, line in report.headline.items()],
            text=f"All numbers with their intervals: `{run.volume / evaluated.folder}`.",
            pictures=jobs.pictures(run.volume, evaluated),
        )
