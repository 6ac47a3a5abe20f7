"""The record of a source: its files are read once into complete rows and statistics; all later steps read the record.

`make_record(source, volume)` checks the source's current state; `cached_record(source, volume)` trusts the last check while the source's
files are unchanged. A record is a folder `sources/NAME-KEY/` with `rows.parquet` and `record.json`, which is written last. KEY is a hash
of the files' names, sizes and modification times, of the source's settings, and of the code that reads sources.
"""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from fcntl import LOCK_EX, flock
from functools import cache
from pathlib import Path
from stat import S_ISREG
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from fvlm_core.data.archives import Archives
from fvlm_core.data.arrow import pc
from fvlm_core.data.jobs import Source
from fvlm_core.data.media import files_of, is_web
from fvlm_core.data.rows import SCHEMA, Kind
from fvlm_core.data.sources.reading import RowsDigest, read_source
from fvlm_core.data.sources.stored import copies, fetch
from fvlm_core.errors import UserError
from fvlm_core.manifest import sha256_file, write_atomically
from fvlm_core.settings import Settings, hash_json

SOURCES = "sources"
"""Folder on the volume, with one subfolder per record."""
ROWS, RECORD = "rows.parquet", "record.json"
FILE, FILE_ROW, PATH = "file", "file_row", "path"
RECORD_SCHEMA = pa.schema(
    [*SCHEMA, (FILE, pa.dictionary(pa.int32(), pa.string())), (FILE_ROW, pa.int64()), (PATH, pa.string())],
)
"""The row; the file that it comes from, and its number there, from 1; the reference of the local media that its url refers to
(`fvlm_core.data.media`), null for web addresses."""
KEY_LENGTH = 12
EXAMPLES = 3
"""Maximum number of missing files listed."""
PROBED = 16
"""Web addresses that a record lists for a check of whether they respond."""
STAT_BLOCK, STAT_THREADS = 1024, 16
"""Files per block of `stat` calls, and threads: on a network volume, each call waits for the network."""


class RowCount(Settings):
    """Number of rows of a source in a split (empty: not decided yet)."""

    source: str
    split: str
    rows: int


class Record(Settings):
    """Statistics of a source that need no reading of its rows: `record.json`."""

    name: str
    kind: Kind
    read: int
    """Rows read from the files."""
    filtered: int
    """Rows left out by the source's filter."""
    left_out: int
    """Rows left out by its format, e.g. chats with a system message."""
    rows: int
    """Rows kept."""
    counts: list[RowCount]
    rows_digest: str
    """Digest of the rows; it does not depend on their file format."""
    rows_bytes: int
    """Size of `rows.parquet`."""
    files_digest: str = ""
    """Digest of the sizes and modification times of the videos that are local files."""
    local: int = 0
    """Number of videos that are local files."""
    missing: int = 0
    """Number of local files that do not exist."""
    missing_examples: list[str] = Field(default_factory=list)
    remote: int = 0
    probe: list[str] = Field(default_factory=list)
    """Some web addresses, evenly spaced."""
    distinct: int = 0
    """Number of different addresses, counted up to two."""

    @property
    def digest(self) -> str:
        """Digest of the source's rows and local files."""
        return hash_json([self.rows_digest, self.files_digest])

    @property
    def sources(self) -> set[str]:
        """Names of the sources that its rows belong to."""
        return {count.source for count in self.counts}

    @classmethod
    def read_folder(cls, folder: Path) -> Self:
        """Read the record in a folder. Raises UserError if there is none, or if it is damaged."""
        if (found := cls._found(folder)) is None:
            raise UserError("there is no record of a source", where=str(folder), fix="record the source again")
        return found

    @classmethod
    def _found(cls, folder: Path) -> Self | None:
        try:
            found = cls.model_validate_json((folder / RECORD).read_bytes())
            return found if (folder / ROWS).stat().st_size == found.rows_bytes else None
        except (OSError, ValueError):
            return None


def make_record(source: Source, volume: Path) -> Record:
    """Return the source's record, made if there is none. Local videos are checked again.

    Raises UserError, naming them, for files that are missing or not in the source's format, and for rows that cannot be used.
    """
    fetch(source.stored, volume / SOURCES)
    files = source_files(source, volume)
    folder = _folder(source, files, volume)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        before = Record._found(folder)
        looked = _look(before or _write_rows(source, files, folder), folder)
        if looked != before:
            write_atomically(folder / RECORD, looked.model_dump_json(indent=2).encode())
    return looked


def cached_record(source: Source, volume: Path) -> Record:
    """Return the source's record as of the last check if its files are unchanged, else call `make_record`."""
    return Record._found(record_folder(source, volume)) or make_record(source, volume)


def record_folder(source: Source, volume: Path) -> Path:
    """Return the folder of the source's record, which may not exist yet. Raises UserError for missing files."""
    return _folder(source, source_files(source, volume), volume)


def read_rows(folder: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a record (RECORD_SCHEMA), or some of their columns, in batches."""
    yield from pq.ParquetFile(folder / ROWS).iter_batches(columns=columns)


def source_files(source: Source, volume: Path) -> list[Path]:
    """Return the source's files, with wildcards expanded, and its copies from an object store. Raises UserError if some are missing."""
    fetched = copies(source.stored, volume / SOURCES)
    if source.stored and not fetched:
        raise UserError("its files were not fetched yet", where=f"source {source.name}", fix="run precompute, or `fvlm data prepare`")
    return [*_resolved(source, source.files), *fetched]


def _resolved(source: Source, paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        found = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(path))) if Path(name).is_file()]
        if not found:
            what = "no file matches" if glob.has_magic(str(path)) else "the file does not exist"
            raise UserError(f"{what}: {path}", where=f"source {source.name}", fix=f"check the path (looked for {path.absolute()})")
        files += found
    return files


def _folder(source: Source, files: Sequence[Path], volume: Path) -> Path:
    stats = [(str(path.absolute()), path.stat()) for path in [*files, *_resolved(source, source.archives)]]
    identity = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    settings = source.model_dump(mode="json", exclude={"files", "stored", "archives", "val_share"})
    return volume / SOURCES / f"{source.name}-{hash_json([settings, identity, _code()])[:KEY_LENGTH]}"


@cache
def _code() -> str:
    """Digest of the code that turns files into rows, so that records are made again after an adapter has changed."""
    folder = Path(__file__).parent
    beside = [folder.with_name(f"{name}.py") for name in ("rows", "addresses", "media", "archives")]
    return hash_json([sha256_file(path) for path in sorted([*folder.glob("*.py"), *beside])])


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    """Let one process at a time make a record. The lock ends with its process."""
    with (folder / ".lock").open("w") as stream:
        flock(stream, LOCK_EX)
        yield


def _write_rows(source: Source, files: Sequence[Path], folder: Path) -> Record:
    """Read the files into `rows.parquet`."""
    digest, counts = RowsDigest(), Counter[tuple[str, str]]()
    read = filtered = left_out = rows = 0
    temporary = folder / f".{ROWS}"
    with ExitStack() as stack:
        archives = None
        if source.archives or source.web_archives:
            places = [*_resolved(source, source.archives), *source.web_archive_addresses]
            archives = stack.enter_context(Archives(places, folder / ".members.sqlite"))
        writer = stack.enter_context(pq.ParquetWriter(temporary, RECORD_SCHEMA, compression="zstd"))
        for part in read_source(source, files, archives):
            number = part.rows.num_rows
            names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(number, np.int32)), pa.array([str(part.file)]))
            writer.write_batch(pa.RecordBatch.from_arrays([*part.rows.columns, names, part.numbers, part.paths], schema=RECORD_SCHEMA))
            digest.update(part.rows)
            counts.update(_pairs(part.rows))
            read, filtered, left_out, rows = read + part.read, filtered + part.filtered, left_out + part.left_out, rows + number
    if not rows:
        why = f": the filter left out {filtered} of {read}, the format {left_out}" if read else ""
        raise UserError(f"the source {source.name} has no rows{why}", where=", ".join(map(str, files)), fix="add rows, or widen the filter")
    temporary.replace(folder / ROWS)
    return Record(
        name=source.name,
        kind=source.kind,
        read=read,
        filtered=filtered,
        left_out=left_out,
        rows=rows,
        counts=[RowCount(source=name, split=split, rows=number) for (name, split), number in sorted(counts.items())],
        rows_digest=digest.hexdigest(),
        rows_bytes=(folder / ROWS).stat().st_size,
    )


def _pairs(rows: pa.RecordBatch) -> dict[tuple[str, str], int]:
    grouped = pa.Table.from_batches([rows]).group_by(["source", "split"]).aggregate([([], "count_all")])
    names, splits, numbers = (grouped[column].to_pylist() for column in ("source", "split", "count_all"))
    return {(name, split): number for name, split, number in zip(names, splits, numbers, strict=True)}


def _look(known: Record, folder: Path) -> Record:
    """Return the record with the current state of its local files and addresses."""
    if known.kind == "text":
        return known
    digest = hashlib.sha256()
    local = missing = remote = 0
    examples: list[str] = []
    probe: list[str] = []
    distinct: set[str] = set()
    every = max(1, -(-known.rows // PROBED))
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        for batch in read_rows(folder, ["url", PATH]):
            urls, paths = batch.column("url"), batch.column(PATH)
            if len(distinct) < 2:
                distinct.update(pc.unique(urls).slice(0, 2).to_pylist())
            is_file = pc.is_valid(paths)
            files, named = paths.drop_null(), urls.filter(is_file)
            blocks = [files.slice(start, STAT_BLOCK).to_pylist() for start in range(0, len(files), STAT_BLOCK)]
            for start, stats in zip(range(0, len(files), STAT_BLOCK), pool.map(stat_files, blocks), strict=True):
                gone = [number for number, stat in enumerate(stats) if stat is None]
                digest.update(hash_json([named.slice(start, STAT_BLOCK).to_pylist(), stats]).encode())
                missing += len(gone)
                examples += [files[start + number].as_py() for number in gone[: EXAMPLES - len(examples)]]
            local += len(files)
            addresses = urls.filter(pc.and_(pc.invert(is_file), pc.not_equal(urls, "")))
            probe += addresses.take(pa.array(np.arange(-remote % every, len(addresses), every))).to_pylist()
            remote += len(addresses)
    return known.model_copy(
        update={
            "files_digest": digest.hexdigest() if local else "",
            "local": local,
            "missing": missing,
            "missing_examples": examples,
            "remote": remote,
            "probe": probe[:PROBED],
            "distinct": min(len(distinct), 2),
        }
    )


def stat_files(references: list[str]) -> list[list[int] | None]:
    """Return size and modification time of the files behind each reference, concatenated; None if one of them is missing.

    Archives on the web are not checked.
    """
    known: dict[str, list[int] | None] = {}  # many references are to the same archive
    found: list[list[int] | None] = []
    for reference in references:
        stats: list[list[int] | None] = []
        for path in files_of(reference):
            if path not in known and is_web(path):
                known[path] = []
            elif path not in known:
                try:
                    status = os.stat(path)
                    known[path] = [status.st_size, status.st_mtime_ns] if S_ISREG(status.st_mode) else None
                except OSError:
                    known[path] = None
            stats.append(known[path])
        found.append(None if None in stats else [number for stat in stats if stat for number in stat])
    return found
