"""Phase 0: videos to shards, on CPU."""

from prefect import flow

from fvlm_core.data.jobs import ShardManifest
from tasks import jobs
from tasks.config import PipelineConfig
from tasks.phase_run import PhaseRun
from tasks.steps import INPUT


@flow(name="precompute", flow_run_name="{config.name} · precompute")
def precompute(config: PipelineConfig, volume: str) -> None:
    """Render or take videos, fetch them with video2dataset, cut them into frames, and write shards with token ids.

    Args:
        config: What every phase does.
        volume: Folder that holds all results (an absolute path).
    """
    settings = config.precompute
    own, rendered, vision = settings.videos is not None, settings.renders_clips, settings.vision is not None
    with PhaseRun("precompute", config, volume, steps=1 + own + 2 * rendered + vision) as run:
        made = [run.make(jobs.download(config, None))] if own else []
        if rendered:
            made.append(run.make(jobs.download(config, run.make(jobs.clips(config)))))
        if vision:
            run.make(jobs.vision(config))
        done = run.make(jobs.shards(config, made))
        manifest = ShardManifest.read(run.volume / done.folder)
        bad = f" {len(manifest.bad)} videos were left out." if manifest.bad else ""
        run.finish(
            [source.model_dump(mode="json") for source in manifest.sources],
            text=f"Frames of {manifest.frame_px} px at {manifest.fps:g} per second; {manifest.vocab_size} tokens in the vocabulary.{bad}",
            chosen={"model.vision.shape": None, "model.vision.checkpoint": f"{INPUT}{jobs.VISION}"} if vision else {},
        )
