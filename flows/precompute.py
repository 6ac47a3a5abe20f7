"""Phase 0: videos to shards, on CPU."""

from prefect import flow

from fvlm_core.data.jobs import ShardManifest
from tasks import jobs
from tasks.config import PipelineConfig
from tasks.outside import record_sources
from tasks.phase_run import PhaseRun
from tasks.steps import INPUT


@flow(name="precompute", flow_run_name="{config.name} · precompute")
def precompute(config: PipelineConfig, volume: str) -> None:
    """Render videos or take sources, fetch them with video2dataset, cut them into frames, and write shards with token ids.

    Args:
        config: What every phase does.
        volume: Folder that holds all results (an absolute path).
    """
    settings = config.precompute
    sources, rendered, vision = settings.video_sources, settings.renders_clips, settings.vision is not None
    with PhaseRun("precompute", config, volume, steps=1 + len(sources) + 2 * rendered + vision) as run:
        record_sources(config, run.volume)
        made = [run.make(jobs.download_source(config, source, run.volume)) for source in sources]
        if rendered:
            made.append(run.make(jobs.download_clips(config, run.make(jobs.clips(config)))))
        if vision:
            run.make(jobs.vision(config))
        done = run.make(jobs.shards(config, made, run.volume))
        manifest = ShardManifest.read(run.volume / done.folder)
        bad = f" {len(manifest.bad)} videos were left out." if manifest.bad else ""
        run.finish(
            [source.model_dump(mode="json") for source in manifest.sources],
            text=f"Frames of {manifest.frame_px} px at {manifest.fps:g} per second; {manifest.vocab_size} tokens in the vocabulary.{bad}",
            chosen={"model.vision.shape": None, "model.vision.checkpoint": f"{INPUT}{jobs.VISION}"} if vision else {},
        )
