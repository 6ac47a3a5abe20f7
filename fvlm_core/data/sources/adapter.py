"""The definition of an adapter for a dataset's format, and the reader of csv, parquet and JSON files that most adapters share."""

import csv
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from fvlm_core.data.arrow import pc
from fvlm_core.data.rows import Kind
from fvlm_core.data.sources.json_files import read_json

ROW_NUMBER = "of"
"""Optional column of `Adapter.rows`, int64: index in the batch of the published row from which each row is made. A published row may
become several rows, or none: then it is left out, and counted."""
CSV_BLOCK_BYTES = 8 << 20
"""Bytes read at a time; no row may be longer."""
PARQUET_ROWS, PARQUET_NESTED_ROWS, PARQUET_MEDIA_ROWS = 1 << 16, 1 << 10, 64
"""Rows read at a time: of flat columns, of nested columns, and of media that have to be read to be counted."""
SHOWN_CHARACTERS = 120
"""Maximum length of a row quoted in an error."""
DEFAULT_PROMPT = "What is the caption of this video?"


def read_table(path: Path, columns: Collection[str], embedded: Collection[str] = ()) -> Iterator[pa.RecordBatch]:
    """Yield those of `columns` that a csv, parquet, json or jsonl file has, in the file's order. Values of a csv are strings.

    For `embedded` columns of a parquet file, which hold media, the number of media in each row is returned, if possible without reading
    them. Raises ValueError (as pyarrow does) for any other file, and for a csv row that has too many or too few values.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path, columns, embedded)
    elif path.suffix == ".csv":
        yield from _read_csv(path, columns)
    elif path.suffix in (".json", ".jsonl"):
        yield from read_json(path, columns)
    else:
        raise ValueError(f"its suffix is {path.suffix!r}, not .csv, .parquet, .json or .jsonl")


def embedded_media(path: Path, embedded: Collection[str]) -> tuple[str, bool] | None:
    """Return the first of these columns that holds media in a parquet file, and whether it holds lists; else None."""
    return _media_column(pq.read_schema(path), embedded) if embedded and path.suffix == ".parquet" else None


@dataclass(frozen=True)
class Published:
    """Size of a dataset as published by its authors; None for numbers that they do not publish."""

    samples: int
    """Rows that its adapter makes from all files."""
    gigabytes: float | None
    """Size of all files with media, in units of 10^9 bytes. All are downloaded, however few of the rows are used."""
    hours: float | None
    """Hours of video in all samples; a video counts once per sample."""
    source: str
    """Where the numbers are published."""
    parts: dict[str, int] = field(default_factory=dict)
    """Samples of each part that can be used alone. Its key is a folder's name, or a part of file names that starts with `_`."""

    def samples_of(self, files: Collection[PurePath]) -> int:
        """Return the number of samples in these files; all samples if the names do not say."""
        named = [
            number
            for part, number in self.parts.items()
            if any(part in path.parts or (part.startswith("_") and part in path.name) for path in files)
        ]
        return sum(named) or self.samples

    def share(self, files: Collection[PurePath], *, every: int, limit: int | None) -> "Published":
        """Return the size of what is used of these files: one in `every` rows, up to `limit`.

        Hours are scaled to the rows that are used, bytes only to the files.
        """
        of_files = self.samples_of(files)
        used = -(-of_files // every)
        used = min(used, limit or used)
        size = None if self.gigabytes is None else self.gigabytes * of_files / self.samples
        return Published(used, size, None if self.hours is None else self.hours * used / self.samples, self.source)


@dataclass(frozen=True)
class Adapter:
    """A dataset's published format, and how it becomes rows (`fvlm_core.data.rows`)."""

    name: str
    """The format's name in a profile: lower-case letters, digits and _."""
    title: str
    kind: Kind
    """Kind of its samples; a column `kind` in the table takes precedence."""
    prompt: str
    """The question to which a caption is the answer. It should name the dataset, so that the model does not take the style of its captions
    for that of descriptions in general. Empty if the dataset has its own questions."""
    homepage: str
    licence: str
    citation: str
    required: tuple[str, ...]
    """Published columns that `rows` needs."""
    rows: Callable[[pa.RecordBatch], pa.RecordBatch]
    """Converts published columns to those of `rows.COLUMNS` that the dataset has (the others get defaults). Without a
    column `ROW_NUMBER`, the number of rows must stay the same."""
    instead: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Alternative columns for one of `required`, by its name."""
    optional: tuple[str, ...] = ()
    """Published columns that `rows` uses if they exist."""
    embedded: tuple[str, ...] = ()
    """Published columns of parquet files that hold the media themselves (bytes, `{bytes, path}`, or lists of them); the first that a file
    has is used. `rows` and filters see the number of media in its place; `url` may select seconds of a video: `t=START,END`."""
    read: Callable[..., Iterator[pa.RecordBatch]] = read_table
    """Function with the signature of `read_table`: yields those of the named columns that a file has, in at least one batch, which may be
    empty."""
    published: Published | None = None
    """Its published size, to plan a run before anything is downloaded."""


def renamed(columns: dict[str, str]) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    """Return `Adapter.rows` for a dataset that only needs its columns renamed, from published names to ours."""
    return lambda batch: batch.select(list(columns)).rename_columns(list(columns.values()))


def _read_parquet(path: Path, columns: Collection[str], embedded: Collection[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        media = [found[0]] if (found := _media_column(schema, embedded)) else []
        wanted = [name for name in schema.names if name in columns or name in media]
        leaves = {name: _light_leaf(file, name) if name in media else name for name in wanted}
        shape = pa.schema([(name, pa.int64()) if name in media else schema.field(name) for name in wanted])
        nested = any(pa.types.is_nested(field.type) for field in shape)
        rows = PARQUET_MEDIA_ROWS if any(leaves[name] == name for name in media) else PARQUET_NESTED_ROWS if nested else PARQUET_ROWS
        for batch in _never_empty(file.iter_batches(rows, columns=list(leaves.values())), shape):
            arrays = [_number_of(batch.column(name)) if name in media and batch.num_rows else batch.column(name) for name in wanted]
            yield pa.RecordBatch.from_arrays(arrays, schema=shape)


def _media_column(schema: pa.Schema, embedded: Collection[str]) -> tuple[str, bool] | None:
    for name in embedded:
        if name in schema.names and _holds_bytes(kind := schema.field(name).type):
            return name, pa.types.is_nested(kind) and not pa.types.is_struct(kind)
    return None


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether values are bytes, `{bytes, path}`, or lists of them."""
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _light_leaf(file: pq.ParquetFile, name: str) -> str:
    """Return the smallest part of a nested column from which its values can be counted: the path beside the bytes, else all of it."""
    leaves = [file.schema.column(number).path for number in range(len(file.schema.names))]
    paths = [leaf for leaf in leaves if leaf.split(".")[0] == name and leaf.split(".")[-1] == "path"]
    return paths[0] if paths else name


def _number_of(column: pa.Array) -> pa.Array:
    """Return the number of media in each row: the length of a list, else 1, or 0 for null."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return pc.fill_null(pc.list_value_length(column), 0).cast(pa.int64())
    return pc.is_valid(column).cast(pa.int64())


def _read_csv(path: Path, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        header = next(csv.reader(stream), [])
    wanted = [name for name in header if name in columns]
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"a column appears twice in its header: {', '.join(header)}")
    schema = pa.schema([(name, pa.string()) for name in wanted])
    if not wanted:
        yield pa.RecordBatch.from_pylist([], schema)
        return
    refused: list[pacsv.InvalidRow] = []

    def refuse(row: pacsv.InvalidRow) -> str:
        refused.append(row)
        return "error"

    try:
        reader = pacsv.open_csv(
            path,
            read_options=pacsv.ReadOptions(block_size=CSV_BLOCK_BYTES, use_threads=False),  # in order, so that rows have numbers
            parse_options=pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=refuse),
            convert_options=pacsv.ConvertOptions(include_columns=wanted, column_types=schema, strings_can_be_null=False),
        )
        yield from _never_empty(reader, schema)
    except pa.ArrowInvalid as error:
        if not refused:
            raise
        row = refused[0]
        raise ValueError(
            f"row {row.number - 1} has {row.actual_columns} values, the header {row.expected_columns}; a comma in a value needs quotes: "
            f"{row.text[:SHOWN_CHARACTERS]}"
        ) from error
    _require_closed_quotes(path)


def _never_empty(batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield the batches, or an empty one if there are none."""
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        yield pa.RecordBatch.from_pylist([], schema)


def _require_closed_quotes(path: Path) -> None:
    """Raise ValueError if the last quote is never closed: pyarrow reads everything after it as one value."""
    with path.open("rb") as stream:
        quotes = 0
        while block := stream.read(CSV_BLOCK_BYTES):
            quotes += block.count(b'"')
    if quotes % 2:  # may be a quote within a value, which is valid; only a strict parser can tell
        csv.field_size_limit(max(csv.field_size_limit(), path.stat().st_size))
        with path.open(encoding="utf-8-sig", newline="") as stream:
            try:
                for _ in csv.reader(stream, strict=True):
                    pass
            except csv.Error as error:
                if "end of data" in str(error):
                    raise ValueError('a value that starts with " has no closing "') from error
