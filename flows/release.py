"""Phase 6: the model's folder, its card and the report of the whole road."""

from prefect import flow

from fvlm_core.release.jobs import HUB_FOLDER, REPORT_HTML, ReleaseManifest
from tasks import jobs
from tasks.config import PipelineConfig, Stages
from tasks.phase_run import PhaseRun


@flow(name="release", flow_run_name="{config.name} · release")
def release(config: PipelineConfig, volume: str) -> None:
    """Package the final model, check it in a clean process, and write the report.

    Args:
        config: What every phase does.
        volume: Folder that holds all results (an absolute path).
    """
    with PhaseRun("release", config, volume, steps=1) as run:
        shards = run.input("precompute", "shards")
        stages = {name: run.input("train", name) for name in Stages.model_fields}
        reports = {
            "precompute": [made for name, made in run.upstream["precompute"].steps.items() if made != shards],
            "speed": run.input("speed", "speed-report"),
            "ablations": run.input("ablations", "ablation-report"),
            "scaling": run.input("scaling", "scaling-report"),
            **stages,
        }
        packed = run.make(jobs.release(config, stages["stage3"], run.input("evaluate", "evaluation"), shards, reports))
        report = ReleaseManifest.read(run.volume / packed.folder)
        folder = run.volume / packed.folder
        run.finish(
            [{"what": "model", "path": str(folder / HUB_FOLDER)}, {"what": "report", "path": str(folder / REPORT_HTML)}],
            text=report.verdict,
        )
