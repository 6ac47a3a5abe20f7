"""Parts of a record: ranges of a few thousand rows, each with its own digest, so that each is fetched and cached separately.

A part's digest covers its rows and, for local files, their sizes and modification times. Rows appended after the part, or a different
limit, do not change it.
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
"""End of the `conversations` JSON of a row with neither a caption nor questions of its own."""


class Part(NamedTuple):
    """Consecutive rows of a record."""

    first: int
    rows: int
    digest: str

    @classmethod
    def of(cls, folder: Path, first: int, rows: int) -> Self:
        """Return the part of `rows` rows that starts at row `first`. Raises ValueError if the record does not have them."""
        total = pq.ParquetFile(folder / ROWS).metadata.num_rows
        if rows < 1 or first + rows > total:
            raise ValueError(f"{folder} has {total} rows, which do not include {rows} from row {first} on")
        return cls(first, rows, _digest(folder, first, rows))

    @property
    def numbers(self) -> range:
        """Numbers of its rows in the record."""
        return range(self.first, self.first + self.rows)


def parts_of(folder: Path, record: Record, samples: int) -> list[Part]:
    """Split the record into parts of `samples` rows; the last one may be smaller.

    The parts are cached beside the record and reused while its digest stays the same.
    """
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
    """Yield the part's rows in batches, each with the number of its first row."""
    yield from _read(folder, part.first, part.rows, columns)


def incomplete(folder: Path, part: Part) -> dict[int, str]:
    """Return the rows of a part that have no URL, or neither a caption nor questions, each with the reason."""
    found: dict[int, str] = {}
    for first, batch in read_part(folder, part, [*REQUIRED, "conversations"]):
        missing = {name: pc.equal(batch.column(name), "") for name in REQUIRED}
        missing["caption"] = pc.and_(missing["caption"], pc.ends_with(batch.column("conversations"), NO_ANSWER))
        for name in REQUIRED:
            found |= {first + row: f"no {name}" for row in pc.indices_nonzero(missing[name]).to_pylist()}
    return found


def _read(folder: Path, first: int, rows: int, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Read only the row groups that contain the rows."""
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
