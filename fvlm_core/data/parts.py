"""The parts of a record: runs of a few thousand rows, each with a digest of its own, so that each is fetched and cached by itself.

A part's digest says what its rows are and, for local files, their sizes and times of change: rows that are added behind it, or another
limit, leave it as it is.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq

from fvlm_core.data.arrow import pc
from fvlm_core.data.rows import COLUMNS, REQUIRED
from fvlm_core.data.sources.reading import RowsDigest
from fvlm_core.data.sources.record import PATH, ROWS, STAT_THREADS, Record, stat_files
from fvlm_core.manifest import write_atomically
from fvlm_core.settings import hash_json

NO_ANSWER = '"answer": ""}]]'
"""How the conversations of a row end that has neither a caption nor questions of its own."""


class Part(NamedTuple):
    """Some consecutive rows of a record."""

    first: int
    rows: int
    digest: str

    @classmethod
    def of(cls, folder: Path, first: int, rows: int) -> Self:
        """Raises ValueError where the record has no such rows."""
        total = pq.ParquetFile(folder / ROWS).metadata.num_rows
        if rows < 1 or first + rows > total:
            raise ValueError(f"{folder} has {total} rows, none or not all of {rows} from {first} on")
        return cls(first, rows, _digest(folder, first, rows))

    @property
    def numbers(self) -> range:
        """Of its rows."""
        return range(self.first, self.first + self.rows)


def parts_of(folder: Path, record: Record, samples: int) -> list[Part]:
    """The record's parts of `samples` rows, the last one of what is left; from the last look where the source is the same."""
    known = folder / f"parts-{samples}.json"
    try:
        values = json.loads(known.read_bytes())
        if values["record"] == record.digest:
            return [Part(*part) for part in values["parts"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    starts = range(0, record.rows, samples)
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        parts = list(pool.map(lambda first: Part.of(folder, first, min(samples, record.rows - first)), starts))
    write_atomically(known, json.dumps({"record": record.digest, "parts": parts}).encode())
    return parts


def read_part(folder: Path, part: Part, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The part's rows, a batch at a time, each with the number of its first row."""
    yield from _read(folder, part.first, part.rows, columns)


def incomplete(folder: Path, part: Part) -> dict[int, str]:
    """Rows of a part that lack what a video cannot do without, an address and words, with the reason."""
    found: dict[int, str] = {}
    for first, batch in read_part(folder, part, [*REQUIRED, "conversations"]):
        missing = {name: pc.equal(batch.column(name), "") for name in REQUIRED}
        missing["caption"] = pc.and_(missing["caption"], pc.ends_with(batch.column("conversations"), NO_ANSWER))
        for name in REQUIRED:
            found |= {first + row: f"no {name}" for row in pc.indices_nonzero(missing[name]).to_pylist()}
    return found


def _read(folder: Path, first: int, rows: int, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Only the row groups that hold the rows are read."""
    with pq.ParquetFile(folder / ROWS) as file:
        start, end = 0, first + rows
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if start < end and start + size > first:
                at = start
                for batch in file.iter_batches(row_groups=[group], columns=list(columns)):
                    low, high = max(first - at, 0), min(end - at, batch.num_rows)
                    if low < high:
                        yield at + low, batch.slice(low, high - low).select(list(columns))
                    at += batch.num_rows
            start += size


def _digest(folder: Path, first: int, rows: int) -> str:
    texts, files = RowsDigest(), hashlib.sha256()
    for _, batch in _read(folder, first, rows, [*COLUMNS, PATH]):
        texts.update(pa.RecordBatch.from_arrays(batch.columns[:-1], names=list(COLUMNS)))
        named = batch.filter(pc.is_valid(batch.column(PATH)))
        if named.num_rows:
            files.update(hash_json([named.column("url").to_pylist(), stat_files(named.column(PATH).to_pylist())]).encode())
    return hash_json([texts.hexdigest(), files.hexdigest()])
