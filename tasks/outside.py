"""What steps read from outside the volume: the profile's sources, by their records on the volume; and what would make them others.

A record is made, or looked at anew, when a run starts (`record_sources`); after that it is trusted while the source's files are the same.
"""

from pathlib import Path

from fvlm_core.data.sources.record import Record, record, recorded
from tasks.config import PipelineConfig

VIDEOS = "videos"
"""The source that the videos of the command line become."""


def record_sources(config: PipelineConfig, volume: Path) -> dict[str, Record]:
    """The record of every source as it is now, by name. Raises UserError for whatever is wrong with one."""
    return {source.name: record(source, volume) for source in config.precompute.sources}


def external_inputs(config: PipelineConfig, volume: Path) -> dict[str, str]:
    """Digests of what precompute reads from outside the volume, by source."""
    return {source.name: recorded(source, volume).digest for source in config.precompute.sources}
