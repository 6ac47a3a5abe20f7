"""Phase 6: the model's folder, its card and the report of the pipeline."""

from prefect import flow

from fvlm_core.release.jobs import ReleaseManifest
from tasks import jobs
from tasks.config import PipelineConfig
from tasks.phase_run import PhaseRun


@flow(name="release", flow_run_name="{config.name} · release")
def release(config: PipelineConfig, volume: str) -> None:
    """Package the final model, check it in a clean process, and write the report.

    Args:
        config: What every phase does.
        volume: Folder that holds all results (an absolute path).
    """
    with PhaseRun("release", config, volume, steps=1) as run:
        steps = {name: made for phase in run.upstream.values() for name, made in phase.steps.items()}
        phases = {name: run.record(name) for name in run.upstream}
        packed = run.make(jobs.release(config, steps, phases))
        report = ReleaseManifest.read(run.volume / packed.folder)
        run.finish(
            [{"what": what, "path": f"{packed.folder}/{path}"} for what, path in report.outputs.items()],
            text=report.verdict,
        )
