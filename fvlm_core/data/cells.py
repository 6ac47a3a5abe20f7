"""Reads single values from parquet files by row: videos and images that a dataset keeps inside its tables.

Needs only pyarrow.
"""

import threading
from collections import OrderedDict
from typing import Any

import pyarrow.parquet as pq

CACHE_BYTES, CURSORS = 128 << 20, 32
"""Limits per process: bytes of cached values, and row groups being read at a time."""
BATCH_ROWS, BATCH_BYTES = 64, 8 << 20
"""Maximum size of one read from a parquet file; the smaller limit applies."""
BUFFER_BYTES = 1 << 20


class Cells:
    """Reads values from parquet files whose row groups may be larger than memory.

    Rows are mostly requested in order, so reading a row group continues where it stopped. Values passed on the way are cached for a while,
    for requests out of order.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cursors: OrderedDict[tuple[str, str, int], _Cursor] = OrderedDict()
        self._values: OrderedDict[tuple[str, str, int], Any] = OrderedDict()
        self._bytes = 0

    def read(self, path: str, column: str, row: int, item: int | None) -> bytes:
        """Return the bytes in a row (from 0), or of one `item` if the value is a list.

        Raises ValueError, KeyError or IndexError if there are none.
        """
        with self._lock:  # a column is decompressed once, whichever thread asks for it first
            value = self._value(path, column, row)
        if item is not None:
            value = value[item] if isinstance(value, list) and item < len(value) else None
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ValueError(f"the column {column} holds no bytes there")
        return content

    def _value(self, path: str, column: str, row: int) -> Any:
        if (found := self._values.get((path, column, row), self)) is not self:
            self._values.move_to_end((path, column, row))
            return found
        with pq.ParquetFile(path) as file:
            first, group = _group_of(file, row)
        cursor = self._cursors.pop((path, column, first), None)
        if cursor is None or cursor.next > row:
            cursor = _Cursor(path, column, group, first)
        self._cursors[path, column, first] = cursor
        if len(self._cursors) > CURSORS:
            self._cursors.popitem(last=False)
        while cursor.next <= row:
            for place, value in cursor.some():
                found = value if place == row else found
                self._keep((path, column, place), value)
        return found

    def _keep(self, key: tuple[str, str, int], value: Any) -> None:
        self._bytes += _size(value) - _size(self._values.pop(key, None))
        self._values[key] = value
        while self._bytes > CACHE_BYTES and len(self._values) > 1:
            self._bytes -= _size(self._values.popitem(last=False)[1])


class _Cursor:
    """Reads a column of a row group from its start."""

    def __init__(self, path: str, column: str, group: int, first: int) -> None:
        self._file = pq.ParquetFile(path, buffer_size=BUFFER_BYTES)
        if column not in self._file.schema_arrow.names:
            raise KeyError(f"no column {column}")
        average = _bytes_of(self._file, group, column) // max(1, self._file.metadata.row_group(group).num_rows)
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, average)))
        self._batches = self._file.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False)
        self.next = first
        """The next row to read."""

    def some(self) -> list[tuple[int, Any]]:
        """Return the numbers of the next rows with their values."""
        values = next(self._batches).column(0).to_pylist()
        start, self.next = self.next, self.next + len(values)
        return list(enumerate(values, start))


def _size(value: Any) -> int:
    """Size of a value in bytes."""
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else len(value) if isinstance(value, bytes | str) else 0


def _group_of(file: pq.ParquetFile, row: int) -> tuple[int, int]:
    """Return the first row of the row group that contains `row`, and the group's number."""
    first = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if row < first + rows:
            return first, group
        first += rows
    raise IndexError("it has fewer rows")


def _bytes_of(file: pq.ParquetFile, group: int, column: str) -> int:
    """Decompressed size of a column in a row group."""
    chunks = [file.metadata.row_group(group).column(number) for number in range(file.metadata.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
