"""WebVid-10M: csv or parquet with `contentUrl` and `name` (columns are found by name; partitions differ in their order).

Most of its URLs have been dead since 2024; whoever has a copy of the videos can point `contentUrl` at it.
"""

from pathlib import Path

from fvlm_core.data.sources.table import Row, read_file, with_defaults
from fvlm_core.errors import UserError

COLUMNS = {"contentUrl": "url", "name": "caption"}


def read_videos(path: Path) -> list[Row]:
    """WebVid's rows as a table of videos. Raises UserError."""
    frame = read_file(path)
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise UserError(
            f"not a WebVid table: no column {' or '.join(missing)}", where=str(path), fix="use format `table`, or WebVid's own file"
        )
    return with_defaults(frame.rename(columns=COLUMNS).filter(COLUMNS.values()), path, source="webvid")
