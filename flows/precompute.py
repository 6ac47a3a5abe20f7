"""Phase 0: from videos to shards, on CPU."""

from pathlib import Path
from typing import Any

from fvlm_core.data.jobs import LEFT_OUT_FILE, ShardManifest, Source
from fvlm_core.data.parts import Part, parts_of
from fvlm_core.data.sources.record import SOURCES, cached_record, record_folder
from fvlm_core.errors import UserError
from fvlm_core.manifest import sha256_file
from fvlm_core.tables import Table
from tasks.config import PipelineConfig
from tasks.external_inputs import external_inputs, natural_clips, record_sources
from tasks.phase import Changes, EarlierResults, Phase, Results, Shown
from tasks.phase_flow import flow_on_demand
from tasks.precompute import RENDERED
from tasks.recipes import AN_INPUT
from tasks.steps import ExternalInput, Given, Step

SHARDS, VISION = "shards", "vision"
LOSSES_SHOWN = 5
"""Number of (source, reason) pairs of omitted samples to show, the most frequent first."""
CLIPS_TABLE = "clips.parquet"
"""Name of the clips' table in the folder of the rendered clips."""


def steps(config: PipelineConfig, before: EarlierResults) -> list[Step]:
    settings, volume = config.precompute, before.volume
    made: list[Step] = []
    downloads = [step for source in settings.video_sources for step in _download_parts(config, source, volume)]
    if settings.renders_clips:
        clips = _clips(config)
        made.append(clips)
        downloads.append(_download_clips(config, clips))
    made += [_vision(config)] if settings.vision else []
    shards = _shards(config, downloads, volume)
    made += [_publish(settings.publish, shards)] if settings.publish else []
    return [*made, *downloads, shards]


def decide(config: PipelineConfig, results: Results) -> Changes:
    """Recipes start from the vision encoder trained in this phase, if there is one."""
    return {"model.vision.shape": None, VISION_CHECKPOINT: AN_INPUT} if VISION in results.made else {}


def show(config: PipelineConfig, results: Results) -> Shown:
    manifest = ShardManifest.read(results.folder(SHARDS))
    lost = sum(loss.samples for loss in manifest.lost)
    most = sorted(manifest.lost, key=lambda loss: -loss.samples)[:LOSSES_SHOWN]
    reasons = "; ".join(f"{loss.samples:,} of {loss.source}: {loss.reason}" for loss in most)
    left_out = f" {lost:,} samples were left out ({reasons}); all are listed in {LEFT_OUT_FILE}." if lost else ""
    return Shown(
        table=Table.of([source.model_dump(mode="json") | {"hours": round(source.hours, 2)} for source in manifest.sources]),
        text=f"Frames of {manifest.frame_px} px at {manifest.fps:g} per second; {manifest.vocab_size} tokens in the vocabulary.{left_out}",
    )


PRECOMPUTE = Phase(
    name="precompute",
    purpose="Render or collect videos, fetch them with video2dataset, extract frames, and write shards with token ids.",
    pool="cpu",
    reads=("precompute", "model.vision"),
    steps=steps,
    decide=decide,
    show=show,
    prepare=record_sources,
    outside=external_inputs,
    links={"shards": SHARDS},
    helpers=lambda config: config.machine.precompute_workers - 1,
    schedule="0 3 * * *",
)
__getattr__ = flow_on_demand(PRECOMPUTE, __name__)

VISION_CHECKPOINT = "model.vision.checkpoint"
"""The recipe setting that names the trained encoder."""


def training_inputs(before: EarlierResults, prefix: str = "") -> dict[str, Given]:
    """A recipe's inputs from this phase, by setting (prefixed by `prefix`): the shards, and the vision encoder if one was trained."""
    made = before.steps(PRECOMPUTE.name)
    inputs: dict[str, Given] = {f"{prefix}shards": made[SHARDS]}
    # in a plan the encoder may not exist yet; then the recipes contain its shape
    if VISION in made and VISION_CHECKPOINT in before.changes:
        inputs[f"{prefix}{VISION_CHECKPOINT}"] = made[VISION]
    return inputs


def _clips(config: PipelineConfig) -> Step:
    natural = natural_clips() if config.precompute.natural else []
    inputs = {"natural": [ExternalInput(path, sha256_file(path)) for path in natural]}
    return Step.of(RENDERED, "fvlm_core.data.clips", config.precompute.clips, inputs=inputs)


def _download_clips(config: PipelineConfig, clips: Step) -> Step:
    """Fetch the rendered clips, whose table always has the format `user`."""
    source = {"name": RENDERED, "files": [None]}
    # one natural clip is anamorphic; its pixels are used as stored, as in all earlier shards
    return _download(config, RENDERED, {"source.files.0": clips.file(CLIPS_TABLE)}, source=source, square_pixels=False)


def _download_parts(config: PipelineConfig, source: Source, volume: Path) -> list[Step]:
    """Fetch the videos of an external source, one step per part."""
    try:
        folder = record_folder(source, volume)
        parts = parts_of(folder, cached_record(source, volume), config.precompute.download.part_samples)
    except UserError:  # only in a plan: a run without these files is refused earlier
        return [_download(config, source.name, {"record": _record(source, volume)})]

    def step(number: int, part: Part) -> Step:
        name = source.name if len(parts) == 1 else f"{source.name}-{number:05d}"
        return _download(config, name, {"record": ExternalInput(folder, part.digest)}, first=part.first, rows=part.rows)

    return [step(number, part) for number, part in enumerate(parts)]


def _download(config: PipelineConfig, name: str, origin: dict[str, Given], **more: Any) -> Step:
    """Fetch the videos of a source; `origin` is the input with its rows."""
    inputs = origin | {"video2dataset_python": ExternalInput(config.machine.video2dataset_python, "")}
    more |= {"frame_px": config.model.vision.frame_px}
    return Step.of(f"download-{name}", "fvlm_core.data.download", config.precompute.download, inputs=inputs, **more)


def _shards(config: PipelineConfig, downloads: list[Step], volume: Path) -> Step:
    """Make the shards from downloads and from the records of text sources."""
    settings = config.precompute
    texts = [_record(source, volume) for source in settings.text_sources]
    shares = [(source, source.val_share) for source in settings.sources if source.val_share is not None]
    val_shares = {name: share for source, share in shares for name in _names(source, volume)}
    inputs: dict[str, Given] = {"downloads": downloads, "texts": texts}
    if frozen := settings.shards.validation:
        inputs["validation"] = ExternalInput(frozen, sha256_file(frozen) if frozen.is_file() else "")
    return Step.of(SHARDS, "fvlm_core.data.shards", settings.shards, inputs=inputs, val_shares=val_shares)


def _publish(to: str, shards: Step) -> Step:
    """Copy the shards to an object store."""
    return Step("publish", "fvlm_core.data.publish", {"to": to}, {"shards": shards})


def _record(source: Source, volume: Path) -> ExternalInput:
    """An external source, identified by its record on the volume."""
    try:
        return ExternalInput(record_folder(source, volume), cached_record(source, volume).digest)
    except UserError:  # only in a plan: a run without these files is refused earlier
        return ExternalInput(volume / SOURCES / source.name, "not here")


def _names(source: Source, volume: Path) -> set[str]:
    """Names of the sources in an external source's rows, which may name their own."""
    try:
        return cached_record(source, volume).sources
    except UserError:  # only in a plan: a run without these files is refused earlier
        return {source.name}


def _vision(config: PipelineConfig) -> Step:
    part, shape = config.precompute.vision, config.model.vision.shape
    assert part is not None
    assert shape is not None
    return Step.of(VISION, "fvlm_core.train.vision", part, shape=shape.model_dump(mode="json"))
