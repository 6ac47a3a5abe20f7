"""Load a command's profile by name or file, with the user's own videos and changed settings."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from deployments.checks import load_profile
from fvlm_core.errors import UserError
from tasks.config import PipelineConfig
from tasks.external_inputs import VIDEOS
from tasks.mixtures import VALIDATION, mixtures
from tasks.recipes import OWN_DATA

CAPTION_SOURCES = ("gaze_caption", "natural")
"""Sources that the user's own videos replace in every mixture."""


def chosen_profile(profile: str, *, videos: Path | None = None, changes: Sequence[str] = ()) -> PipelineConfig:
    """Load a profile, with the user's videos and `PATH=VALUE` changes. Relative paths in changes start at the working directory.

    Raises UserError for an unknown setting or an invalid value.
    """
    config = load_profile(profile)
    config = with_videos(config, videos.resolve()) if videos else config
    config = config.with_changes(dict(map(parse_change, changes)), where="--set", folder=Path.cwd()) if changes else config
    return with_command(config, profile, videos=videos, changes=changes)


def with_command(config: PipelineConfig, profile: str, *, videos: Path | None = None, changes: Sequence[str] = ()) -> PipelineConfig:
    """The profile, with the command of these options as its release's `reproduce`, unless the profile sets it."""
    if config.release.reproduce:
        return config
    options = [*(["--videos", str(videos)] if videos else []), *(part for change in changes for part in ("--set", change))]
    command = shlex.join(["./speedrun.sh", "--profile", profile, *options])
    return config.model_copy(update={"release": config.release.model_copy(update={"reproduce": [command]})})


def parse_change(text: str) -> tuple[str, Any]:
    """Parse `stages.stage2.run.steps=10` to a path and a value. Values are YAML, so `[1, 2]` and `{a: b}` are lists and dicts."""
    path, separator, value = text.partition("=")
    if not separator or not path.strip():
        raise UserError(f"not a change: {text!r}", where="--set", fix="write PATH=VALUE, e.g. --set stages.stage2.run.steps=10")
    try:
        return path.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"the value of {path} is not YAML: {value!r}", where="--set", fix="quote it, e.g. --set 'name=\"a: b\"'") from error


def with_videos(config: PipelineConfig, videos: Path) -> PipelineConfig:
    """The profile with the user's own videos, a source of format `user`, in place of the default captioned clips."""
    values = config.model_dump(mode="json")
    others = [source for source in values["precompute"]["sources"] if source["name"] != VIDEOS]
    values["precompute"] |= {"sources": [*others, {"name": VIDEOS, "files": [str(videos)]}], "natural": False}
    for part in (values["base"], *(stage for stage in values["stages"].values() if stage)):
        for data in (part["data"], part["data"]["validation"]):
            if data:
                data["mixture"] = _with_videos(data["mixture"])
    for ablation in values["ablations"]:
        if ablation["path"] in (OWN_DATA, VALIDATION):
            ablation["value"] = _with_videos(ablation["value"])
    mine = PipelineConfig.from_values(values, where=f"the profile {config.name} with {videos}")
    if not any(part.source == VIDEOS for _, _, mixture in mixtures(mine) for part in mixture):
        raise UserError(
            f"no mixture of the profile {config.name} has a share for them",
            where="--videos",
            fix=f"name the source {VIDEOS!r} in a mixture of the profile, or one of {', '.join(CAPTION_SOURCES)}, whose place they take",
        )
    return mine


def _with_videos(mixture: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replace the default captioned clips in a mixture with the user's videos, at the same share."""
    share = sum(one["share"] for one in mixture if one["source"] in CAPTION_SOURCES)
    kept = [one for one in mixture if one["source"] not in CAPTION_SOURCES]
    return kept + ([{"source": VIDEOS, "share": share}] if share else [])
