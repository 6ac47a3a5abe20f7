"""From a source's published files to complete rows, a batch at a time, with errors that name the file and the row."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from fvlm_core.data.addresses import AddressError, local_paths
from fvlm_core.data.arrow import pc
from fvlm_core.data.jobs import Source
from fvlm_core.data.rows import SCHEMA
from fvlm_core.data.sources import ADAPTERS
from fvlm_core.data.sources.adapter import KEEP, Adapter
from fvlm_core.data.sources.normalise import FilterError, RowError, complete, meets
from fvlm_core.errors import UserError
from fvlm_core.settings import hash_json

EXAMPLES = 3
"""Offending rows that an error names."""


class Part(NamedTuple):
    """Some rows of a source, in order."""

    file: Path
    rows: pa.RecordBatch
    """SCHEMA, complete."""
    numbers: pa.Array
    """int64: the rows' numbers in their file, from 1."""
    paths: pa.Array
    """string: the local files that their urls mean, null for addresses of the web."""
    read: int
    """Rows of the file that were looked at for these."""
    filtered: int
    """Of these, left out by the source's filter."""

    @property
    def left_out(self) -> int:
        """Left out by the format."""
        return self.read - self.filtered - self.rows.num_rows

    def first(self, number: int) -> "Part":
        """The first rows only, as if no more had been looked at."""
        if number >= self.rows.num_rows:
            return self
        return self._replace(
            rows=self.rows.slice(0, number),
            numbers=self.numbers.slice(0, number),
            paths=self.paths.slice(0, number),
            read=self.filtered + self.left_out + number,
        )


def read_source(source: Source, files: Sequence[Path]) -> Iterator[Part]:
    """The rows that the source's filter and limit let through. Raises UserError for what cannot be read or used."""
    adapter, left = ADAPTERS[source.format], source.limit
    for file in files:
        for part in _read_file(source, adapter, file):
            if left is None:
                yield part
                continue
            yield part.first(left)
            left -= min(left, part.rows.num_rows)
            if not left:
                return


def _read_file(source: Source, adapter: Adapter, file: Path) -> Iterator[Part]:
    wanted = dict.fromkeys([*adapter.required, *adapter.optional, *(condition.column for condition in source.filter)])
    first = 1
    for batch in _published(adapter, file, wanted):
        if missing := [name for name in adapter.required if name not in batch.schema.names]:
            raise UserError(
                f"not a file of the format {adapter.name}: it lacks the column{'s' * (len(missing) > 1)} {' and '.join(missing)}",
                where=f"{file}, which has of those that are needed: {', '.join(batch.schema.names) or 'none'}",
                fix=f"name the columns {' and '.join(adapter.required)}, or give the source another format ({', '.join(sorted(ADAPTERS))})",
            )
        numbers = pa.array(np.arange(first, first + batch.num_rows))
        try:
            met = meets(batch, source.filter)
            chosen, kept = batch.filter(met), numbers.filter(met)
            ours = adapter.rows(chosen)
            if KEEP in ours.schema.names:
                keep = ours.column(KEEP)
                ours, kept = ours.filter(keep), kept.filter(keep)
            rows = complete(ours, adapter, source.name)
        except FilterError as error:
            raise UserError(
                str(error), where=f"the filter of source {source.name}, in {file}", fix="correct the filter's column"
            ) from error
        except RowError as error:
            raise _user_error(error, file, kept) from error
        except (KeyError, TypeError, AttributeError, ValueError, pa.ArrowException) as error:
            raise _unreadable(error, file, adapter) from error
        paths = _paths(rows, kept, source.media or file.absolute().parent, file)
        yield Part(file, rows, kept, paths, batch.num_rows, batch.num_rows - chosen.num_rows)
        first += batch.num_rows


def _published(adapter: Adapter, file: Path, wanted: Collection[str]) -> Iterator[pa.RecordBatch]:
    """What the adapter reads, with its errors as UserError."""
    try:
        yield from adapter.read(file, wanted)
    except (OSError, KeyError, TypeError, AttributeError, ValueError, pa.ArrowException) as error:
        raise _unreadable(error, file, adapter) from error


def _unreadable(error: Exception, file: Path, adapter: Adapter) -> UserError:
    reason = f"{error}" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
    return UserError(f"not a readable file of the format {adapter.name}: {reason}", where=str(file), fix="correct the file or the format")


def _user_error(fault: RowError, file: Path, numbers: pa.Array) -> UserError:
    """The fault with the rows' numbers in their file."""
    named = [f"row {numbers[row].as_py()}" for row in fault.rows[:EXAMPLES]]
    if not fault.values:
        return UserError(fault.what, where=f"{file}, {', '.join(named)}", fix=fault.fix)
    shown = ", ".join(f"{value} ({place})" for value, place in zip(fault.values, named, strict=False))
    more = f" and {len(fault.rows) - EXAMPLES} more near them" if len(fault.rows) > EXAMPLES else ""
    return UserError(f"{fault.what}: {shown}{more}", where=str(file), fix=fault.fix)


def _paths(rows: pa.RecordBatch, numbers: pa.Array, media: Path, file: Path) -> pa.Array:
    """The local file of each row. Raises UserError that names rows whose address cannot be fetched."""
    urls = rows.column("url")
    try:
        return local_paths(urls, media)
    except AddressError as error:
        values = [repr(urls[row].as_py()) for row in error.rows[:EXAMPLES]]
        fault = RowError(
            str(error), error.rows, values=values, fix="give http(s) addresses or files; fetch others first, e.g. to the volume"
        )
        raise _user_error(fault, file, numbers) from error


class RowsDigest:
    """sha256 of the rows' texts, column by column: equal however the rows were cut into batches."""

    def __init__(self) -> None:
        self.hashes = [(hashlib.sha256(), hashlib.sha256()) for _ in SCHEMA]

    def update(self, rows: pa.RecordBatch) -> None:
        """Add rows."""
        for (texts, sizes), column in zip(self.hashes, rows.columns, strict=True):
            content = (
                pc.binary_join(pa.ListArray.from_arrays([0, len(column)], column.cast(pa.binary())), b"")[0].as_buffer()
                if len(column)
                else b""
            )
            texts.update(content)
            sizes.update(pc.binary_length(column).to_numpy().tobytes())

    def hexdigest(self) -> str:
        """Of all rows so far."""
        return hash_json([[texts.hexdigest(), sizes.hexdigest()] for texts, sizes in self.hashes])
