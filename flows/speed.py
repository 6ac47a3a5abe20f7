"""Phase 1: how fast training runs, naive and tuned, and the settings to go on with."""

from prefect import flow

from fvlm_core.train.jobs import SpeedReport
from tasks import jobs
from tasks.config import PipelineConfig
from tasks.phase_run import PhaseRun
from tasks.recipes import base_recipe


@flow(name="speed", flow_run_name="{config.name} · speed")
def speed(config: PipelineConfig, volume: str) -> None:
    """Measure the base recipe naive and tuned, one setting after the other, and choose the fastest.

    Args:
        config: What every phase does.
        volume: Folder that holds all results (an absolute path).
    """
    with PhaseRun("speed", config, volume, steps=1) as run:
        inputs = jobs.training_inputs(run.upstream["precompute"])
        measured = run.make(jobs.speed_report(config, base_recipe(config, "base", "speed", run.chosen()), inputs))
        report = SpeedReport.read(run.volume / measured.folder)
        chosen = ", ".join(f"`{path}` = `{value}`" for path, value in report.chosen.items())
        columns = {"variant", "steps", "step_s", "samples_per_s", "gflops_per_s", "mfu", "gpu_busy", "peak_memory_gb", "data_wait_share"}
        run.finish(
            [row.model_dump(mode="json", include=columns) for row in report.rows],
            text=f"Tuned training is **{report.speedup:.2f}x** as fast as naive on {report.device}. Chosen: {chosen}.",
            chosen=report.chosen,
            pictures=jobs.pictures(run.volume, measured),
        )
