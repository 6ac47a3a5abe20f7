"""What an adapter says about a dataset's format, and the reader of csv, parquet and JSON files that most of them share."""

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

OF = "of"
"""Optional column of `Adapter.rows`, int64: the place in the batch of the published row that each row is made of. A published row may
become several rows, or none: then it is left out, and counted."""
CSV_BLOCK_BYTES = 8 << 20
"""Read at a time; no row may be longer."""
PARQUET_ROWS, PARQUET_NESTED_ROWS, PARQUET_MEDIA_ROWS = 1 << 16, 1 << 10, 64
"""Read at a time: flat columns, nested ones, and media that have to be read to be counted."""
SHOWN_CHARACTERS = 120
"""Of a row that an error quotes."""
DEFAULT_PROMPT = "What is the caption of this video?"


def read_table(path: Path, columns: Collection[str], embedded: Collection[str] = ()) -> Iterator[pa.RecordBatch]:
    """Those of the `columns` that a csv, parquet, json or jsonl file has, in its order; a csv's values are text.

    Of `embedded` columns, which hold media, a parquet file gives how many are in each row, without reading them where it can.
    Raises ValueError (as pyarrow does) for what is not such a file, and for a csv row that has too many or too few values.
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
    """The first of the columns that holds media in a parquet file, and whether in lists; None where none does, or for other files."""
    return _media_column(pq.read_schema(path), embedded) if embedded and path.suffix == ".parquet" else None


@dataclass(frozen=True)
class Published:
    """What a dataset's authors say of its size. None is what they do not say."""

    samples: int
    """Rows that its adapter makes of all its files."""
    gigabytes: float | None
    """Of all its files, media included (10^9 bytes): to be downloaded, however few of the rows are used."""
    hours: float | None
    """Of video in all its samples: a video counts in each."""
    source: str
    """Where that is published."""
    parts: dict[str, int] = field(default_factory=dict)
    """Samples of what can be had alone, by its folder's name, or by a part of its files' names that starts with `_`."""

    def samples_of(self, files: Collection[PurePath]) -> int:
        """Samples in files of such names; all where the names do not say."""
        named = [
            number
            for part, number in self.parts.items()
            if any(part in path.parts or (part.startswith("_") and part in path.name) for path in files)
        ]
        return sum(named) or self.samples

    def share(self, files: Collection[PurePath], *, every: int, limit: int | None) -> "Published":
        """Of what is used of those files: every so many rows, up to a limit. Hours and bytes in proportion, bytes to the files only."""
        of_files = self.samples_of(files)
        used = -(-of_files // every)
        used = min(used, limit or used)
        size = None if self.gigabytes is None else self.gigabytes * of_files / self.samples
        return Published(used, size, None if self.hours is None else self.hours * used / self.samples, self.source)


@dataclass(frozen=True)
class Adapter:
    """A dataset's published form, and how it becomes rows (`fvlm_core.data.rows`)."""

    name: str
    """The format's name in a profile: lower-case letters, digits and _."""
    title: str
    kind: Kind
    """Of its samples; a table's own column `kind` wins."""
    prompt: str
    """What is asked when a caption is the answer: captions in a dataset's own manner are not passed off as descriptions. Empty where the
    dataset brings its own questions."""
    homepage: str
    licence: str
    citation: str
    required: tuple[str, ...]
    """Published columns that `rows` needs."""
    rows: Callable[[pa.RecordBatch], pa.RecordBatch]
    """From published columns to those of `rows.COLUMNS` that the dataset knows (the others get their defaults), as many rows unless a
    column `OF` says otherwise."""
    instead: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Columns that one of `required` may be replaced by, by its name."""
    optional: tuple[str, ...] = ()
    """Published columns that `rows` uses where they are."""
    embedded: tuple[str, ...] = ()
    """Published columns that hold the media themselves (bytes, `{bytes, path}`, or lists of them) in parquet files; the first that a file
    has is used. `rows` and filters get the number of media in its place; `url` may say which seconds are meant: `t=START,END`."""
    read: Callable[..., Iterator[pa.RecordBatch]] = read_table
    """Called as `read_table`: gives those of the named published columns that a file has, a batch at a time (at least one, perhaps
    without rows)."""
    published: Published | None = None
    """Its size, for a plan before anything is downloaded."""


def renamed(columns: dict[str, str]) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    """`Adapter.rows` of a dataset whose columns only have other names: published name to ours."""
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
    """The smallest part of a nested column that says how many values it has: a file name beside the bytes; else all of it."""
    leaves = [file.schema.column(number).path for number in range(len(file.schema.names))]
    paths = [leaf for leaf in leaves if leaf.split(".")[0] == name and leaf.split(".")[-1] == "path"]
    return paths[0] if paths else name


def _number_of(column: pa.Array) -> pa.Array:
    """How many media are in each row: of a list its length, else 1, or 0 where there is nothing."""
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
    """The batches, or one without rows."""
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        yield pa.RecordBatch.from_pylist([], schema)


def _require_closed_quotes(path: Path) -> None:
    """Raises ValueError where the last quote is never closed: pyarrow takes all that follows it for one value."""
    with path.open("rb") as stream:
        quotes = 0
        while block := stream.read(CSV_BLOCK_BYTES):
            quotes += block.count(b'"')
    if quotes % 2:  # may be a quote within a value, which is fine; only a strict look can tell
        csv.field_size_limit(max(csv.field_size_limit(), path.stat().st_size))
        with path.open(encoding="utf-8-sig", newline="") as stream:
            try:
                for _ in csv.reader(stream, strict=True):
                    pass
            except csv.Error as error:
                if "end of data" in str(error):
                    raise ValueError('a value that starts with " has no closing "') from error
