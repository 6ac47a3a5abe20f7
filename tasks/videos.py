"""The user's own clips: a csv or parquet file with the columns `url` (http address or file path) and `caption`."""

import csv
from pathlib import Path

from fvlm_core.errors import UserError
from fvlm_core.manifest import sha256_file
from fvlm_core.settings import hash_json

COLUMNS = ("url", "caption")
FORMATS = (".csv", ".parquet")


def read_urls(table: Path) -> list[str]:
    """The urls of the table. Raises UserError: no such file, not readable, a column missing, no rows."""
    fix = f"give a csv or parquet file with the columns {' and '.join(COLUMNS)}, one row per clip"
    if not table.is_file():
        raise UserError("the videos file does not exist", where=str(table), fix=fix)
    if table.suffix.lower() not in FORMATS:
        raise UserError(f"a videos file is {' or '.join(FORMATS)}, this is {table.suffix or 'neither'}", where=str(table), fix=fix)
    try:
        columns = _read_csv(table) if table.suffix.lower() == ".csv" else _read_parquet(table)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"the videos file cannot be read: {error}", where=str(table), fix=fix) from error
    if missing := [name for name in COLUMNS if name not in columns]:
        has = ", ".join(columns) or "none"
        raise UserError(f"the videos file lacks the column {' and '.join(missing)}; it has: {has}", where=str(table), fix=fix)
    urls = [str(url) for url in columns["url"] if url]
    if not urls:
        raise UserError("the videos file has no rows", where=str(table), fix=fix)
    return urls


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
    path = Path(url.removeprefix("file://")).expanduser()
    return path if path.is_absolute() else table.resolve().parent / path


def _read_csv(table: Path) -> dict[str, list[str]]:
    with table.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        rows = list(reader)
    return {name: [row[name] for row in rows] for name in reader.fieldnames or ()}


def _read_parquet(table: Path) -> dict[str, list]:
    import pyarrow.parquet  # half a second, and only needed for parquet

    file = pyarrow.parquet.ParquetFile(table)
    names = [name for name in file.schema_arrow.names if name in COLUMNS]
    return {name: [] for name in file.schema_arrow.names} | file.read(columns=names).to_pydict()
