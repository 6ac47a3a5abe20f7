"""The user's own clips: which table of videos, and what would make it another one."""

from pathlib import Path

from fvlm_core.manifest import sha256_file
from fvlm_core.settings import hash_json

SOURCE = "videos"
"""Name of the source that the user's videos become."""


def read_urls(table: Path) -> list[str]:
    """The urls of the table. Raises UserError for whatever is wrong with the file."""
    from fvlm_core.data.sources.table import read_videos  # imports pandas: half a second that only this needs

    return [row["url"] for row in read_videos(table, source=SOURCE)]


def table_digest(table: Path) -> str:
    """Identity of the table and of the local files it names (by size and time of change: they may be many and large)."""
    stats = []
    for url in read_urls(table):
        path = local_path(url, table)
        if path is not None:
            stats.append([str(path), path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else [str(path), "missing"])
    return hash_json([sha256_file(table), stats])


def local_path(url: str, table: Path) -> Path | None:
    """The file that a url of the table means: relative ones start at the table's folder; None for http and the like."""
    if "://" in url and not url.startswith("file://"):
        return None
    path = Path(url.removeprefix("file://"))
    return path if path.is_absolute() else table.resolve().parent / path
