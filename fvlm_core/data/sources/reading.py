"""Reads a source's published files into complete rows, in batches, with errors that name the file and the row."""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from fvlm_core.data.addresses import AddressError, local_paths
from fvlm_core.data.archives import AmbiguousMemberError, Archives
from fvlm_core.data.arrow import pc
from fvlm_core.data.jobs import Source
from fvlm_core.data.media import NEXT, SECONDS, cell_reference, without_window
from fvlm_core.data.rows import SCHEMA
from fvlm_core.data.sources import ADAPTERS
from fvlm_core.data.sources.adapter import ROW_NUMBER, Adapter, embedded_media
from fvlm_core.data.sources.normalise import FilterError, RowError, complete, meets
from fvlm_core.errors import UserError
from fvlm_core.settings import hash_json

EXAMPLES = 3
"""Maximum number of rows listed in an error."""
LIST_MARK = '["'
"""Start of an address that is a JSON list of several."""


class Part(NamedTuple):
    """Consecutive rows of a source."""

    file: Path
    rows: pa.RecordBatch
    """Complete rows of SCHEMA."""
    numbers: pa.Array
    """int64: the rows' numbers in their file, from 1."""
    paths: pa.Array
    """string: references of the local media that their urls refer to (`fvlm_core.data.media`), null for web addresses."""
    read: int
    """Number of rows read from the file for this part."""
    filtered: int
    """Number of these left out by the source's filter."""
    left_out: int
    """Number of these left out by the format."""

    def first(self, number: int) -> "Part":
        """Return only the first `number` rows, as if no more had been read."""
        if number >= self.rows.num_rows:
            return self
        numbers = self.numbers.slice(0, number)
        return self._replace(
            rows=self.rows.slice(0, number),
            numbers=numbers,
            paths=self.paths.slice(0, number),
            read=self.filtered + self.left_out + len(pc.unique(numbers)),
        )


def read_source(source: Source, files: Sequence[Path], archives: Archives | None = None) -> Iterator[Part]:
    """Yield the rows within the source's filter and limit. Raises UserError for files or rows that cannot be read or used.

    `archives`: the source's archives, which are searched for its media first.
    """
    adapter, left, places, before = ADAPTERS[source.format], source.limit, _places(files), 0
    for file in files:
        for part in _read_file(source, adapter, file, places[file], archives, before):
            before += part.read
            if left is None:
                yield part
                continue
            yield part.first(left)
            left -= min(left, part.rows.num_rows)
            if not left:
                return


def _places(files: Sequence[Path]) -> dict[Path, str]:
    """Return the name of each file in its media's addresses: only folder and name, so that it is independent of the dataset's location.

    If two files have the same folder and name, each file is named by its path relative to their common folder.
    """
    whole = {file: file.absolute() for file in files}
    places = {file: f"{path.parent.name}/{path.name}" for file, path in whole.items()}
    if len(set(places.values())) == len(set(whole.values())):
        return places
    top = os.path.commonpath([path.parent for path in whole.values()])
    return {file: path.relative_to(top).as_posix() for file, path in whole.items()}


def _read_file(source: Source, adapter: Adapter, file: Path, place: str, archives: Archives | None, before: int) -> Iterator[Part]:
    """Yield the rows of one file. `before`: number of rows in the files before it, which `every` also counts."""
    replacing = [name for names in adapter.instead.values() for name in names]
    wanted = dict.fromkeys([*adapter.required, *replacing, *adapter.optional, *(condition.column for condition in source.filter)])
    first, media = 1, None
    for batch in _published(adapter, file, wanted):
        _require_columns(batch, adapter, file)
        media = media or embedded_media(file, adapter.embedded)
        numbers = pa.array(np.arange(first, first + batch.num_rows))
        try:
            met = meets(batch, source.filter)
            if source.every > 1:
                met = pc.and_(met, pa.array((before + numbers.to_numpy() - 1) % source.every == 0))
            chosen, kept = batch.filter(met), numbers.filter(met)
            ours = adapter.rows(chosen)
            row_numbers = ours.column(ROW_NUMBER) if ROW_NUMBER in ours.schema.names else pa.array(np.arange(chosen.num_rows))
            if media:
                there = pc.greater(chosen.column(media[0]).take(row_numbers), 0)
                ours, row_numbers = ours.filter(there), row_numbers.filter(there)
            kept = kept.take(row_numbers)
            paths = None
            if media:
                ours, paths = _embedded(ours, kept, chosen.column(media[0]).take(row_numbers), *media, file, place)
            rows = complete(ours, adapter, source.name)
        except FilterError as error:
            raise UserError(
                str(error), where=f"the filter of source {source.name}, in {file}", fix="correct the filter's column"
            ) from error
        except RowError as error:
            raise _user_error(error, file, kept) from error
        except (KeyError, TypeError, AttributeError, ValueError, pa.ArrowException) as error:
            raise _unreadable(error, file, adapter) from error
        if paths is None:
            paths = _paths(rows, kept, source.media or file.absolute().parent, file, archives)
        left_out = chosen.num_rows - len(pc.unique(row_numbers))
        yield Part(file, rows, kept, paths, batch.num_rows, batch.num_rows - chosen.num_rows, left_out)
        first += batch.num_rows


def _require_columns(batch: pa.RecordBatch, adapter: Adapter, file: Path) -> None:
    """Raise UserError, naming them, if the file lacks required columns."""
    names = batch.schema.names
    missing = [name for name in adapter.required if not {name, *adapter.instead.get(name, ())} & set(names)]
    if missing:
        wanted = [" or ".join([name, *adapter.instead.get(name, ())]) for name in adapter.required]
        raise UserError(
            f"not a file of the format {adapter.name}: it lacks the column{'s' * (len(missing) > 1)} {' and '.join(missing)}",
            where=f"{file}; of the needed columns, it has: {', '.join(names) or 'none'}",
            fix=f"name the columns {' and '.join(wanted)}, or give the source another format ({', '.join(sorted(ADAPTERS))})",
        )


def _embedded(
    ours: pa.RecordBatch, numbers: pa.Array, counts: pa.Array, column: str, listed: bool, file: Path, place: str
) -> tuple[pa.RecordBatch, pa.Array]:
    """Return the rows with addresses of their media in the parquet file, called `place` in them, and the references."""
    where = str(file.absolute())
    windows = ours.column("url").to_pylist() if "url" in ours.schema.names else [""] * ours.num_rows
    urls, references = [], []
    for number, count, window in zip(numbers.to_pylist(), counts.to_pylist(), windows, strict=True):
        urls.append(f"{place}#row={number}" + (f"&{window}" if window else ""))
        items = range(count) if listed else [None]
        references.append(NEXT.join(cell_reference(where, column, number - 1, item) for item in items))
    columns = {name: ours.column(name) for name in ours.schema.names} | {"url": pa.array(urls, pa.string())}
    return pa.RecordBatch.from_pydict(columns), pa.array(references, pa.string())


def _published(adapter: Adapter, file: Path, wanted: Collection[str]) -> Iterator[pa.RecordBatch]:
    """Yield what the adapter reads; its errors become UserError."""
    try:
        yield from adapter.read(file, wanted, adapter.embedded)
    except (OSError, KeyError, TypeError, AttributeError, ValueError, pa.ArrowException) as error:
        raise _unreadable(error, file, adapter) from error


def _unreadable(error: Exception, file: Path, adapter: Adapter) -> UserError:
    reason = f"{error}" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
    return UserError(f"not a readable file of the format {adapter.name}: {reason}", where=str(file), fix="correct the file or the format")


def _user_error(fault: RowError, file: Path, numbers: pa.Array) -> UserError:
    """Return the fault as a UserError, with the numbers of the rows in their file."""
    named = [f"row {numbers[row].as_py()}" for row in fault.rows[:EXAMPLES]]
    if not fault.values:
        return UserError(fault.what, where=f"{file}, {', '.join(named)}", fix=fault.fix)
    shown = ", ".join(f"{value} ({place})" for value, place in zip(fault.values, named, strict=False))
    more = f" and {len(fault.rows) - EXAMPLES} more near them" if len(fault.rows) > EXAMPLES else ""
    return UserError(f"{fault.what}: {shown}{more}", where=str(file), fix=fault.fix)


def _paths(rows: pa.RecordBatch, numbers: pa.Array, media: Path, file: Path, archives: Archives | None) -> pa.Array:
    """Return the reference of each row's media. Raises UserError, naming the rows, if an address cannot be fetched."""
    urls = rows.column("url")
    fix = "give http(s) addresses or files; download others first, e.g. to the volume"
    try:
        whole = pc.replace_substring_regex(urls, SECONDS.pattern, "")
        several = pc.starts_with(urls, LIST_MARK)
        paths = local_paths(pc.if_else(several, "", whole), media)
        special = pc.indices_nonzero(pc.or_(several, pc.is_valid(paths)) if archives else several).to_pylist()
        if not special:
            return paths
        found = [_reference(row, urls[row].as_py(), media, archives) for row in special]
        mask = np.zeros(len(urls), bool)
        mask[special] = True
        return pc.replace_with_mask(paths, pa.array(mask), pa.array(found, pa.string()))
    except AddressError as error:
        rows_, message = error.rows, str(error)
    values = [repr(urls[row].as_py()) for row in rows_[:EXAMPLES]]
    raise _user_error(RowError(message, rows_, values=values, fix=fix), file, numbers)


def _reference(row: int, url: str, media: Path, archives: Archives | None) -> str:
    """Return the reference of a file, or those of a list of images, in an archive or at their own address. Raises AddressError."""
    addresses = [without_window(url)]
    if url.startswith(LIST_MARK):
        try:
            addresses = json.loads(url)
        except ValueError as error:
            raise AddressError(f"not a JSON list of files: {error}", [row]) from error
    references = []
    for address in addresses:
        try:
            found = archives.find(address) if archives else None
        except AmbiguousMemberError as error:
            raise AddressError(str(error), [row]) from error
        try:
            found = found or local_paths(pa.array([address], pa.string()), media)[0].as_py()
        except AddressError as error:
            raise AddressError(str(error), [row]) from error
        if found is None:
            raise AddressError("several images of one sample must be local files", [row])
        references.append(found)
    return NEXT.join(references)


class RowsDigest:
    """sha256 of the rows' texts, column by column. It does not depend on how the rows are split into batches."""

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
        """Return the digest of all rows so far."""
        return hash_json([[texts.hexdigest(), sizes.hexdigest()] for texts, sizes in self.hashes])
