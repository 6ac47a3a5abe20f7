"""What an adapter says about a dataset's format, and the reader of csv and parquet files that most of them share."""

import csv
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from fvlm_core.data.rows import Kind

KEEP = "keep"
"""Optional boolean column of `Adapter.rows`: false leaves the row out, and it is counted."""
CSV_BLOCK_BYTES = 8 << 20
"""Read at a time; no row may be longer."""
PARQUET_ROWS = 1 << 16
SHOWN_CHARACTERS = 120
"""Of a row that an error quotes."""
DEFAULT_PROMPT = "What is the caption of this video?"


def read_table(path: Path, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
    """Those of the `columns` that a csv or parquet file has, in its order; a csv's values are text.

    Raises ValueError (as pyarrow does) for what is not such a file, and for a csv row that has too many or too few values.
    """
    if path.suffix == ".parquet":
        file = pq.ParquetFile(path)
        wanted = [name for name in file.schema_arrow.names if name in columns]
        yield from _never_empty(file.iter_batches(PARQUET_ROWS, columns=wanted), pa.schema([file.schema_arrow.field(n) for n in wanted]))
    elif path.suffix == ".csv":
        yield from _read_csv(path, columns)
    else:
        raise ValueError(f"its suffix is {path.suffix!r}, not .csv or .parquet")


@dataclass(frozen=True)
class Adapter:
    """A dataset's published form, and how it becomes rows (`fvlm_core.data.rows`)."""

    name: str
    """The format's name in a profile: lower-case letters, digits and _."""
    title: str
    kind: Kind
    """Of its samples; a table's own column `kind` wins."""
    prompt: str
    """What is asked when a caption is the answer: captions in a dataset's own manner are not passed off as descriptions."""
    homepage: str
    licence: str
    citation: str
    required: tuple[str, ...]
    """Published columns that `rows` needs."""
    rows: Callable[[pa.RecordBatch], pa.RecordBatch]
    """From published columns to those of `rows.COLUMNS` that the dataset knows (the others get their defaults), as many rows. A column
    `KEEP` leaves rows out."""
    optional: tuple[str, ...] = ()
    """Published columns that `rows` uses where they are."""
    read: Callable[[Path, Collection[str]], Iterator[pa.RecordBatch]] = read_table
    """Reads those of the named published columns that a file has, a batch at a time (at least one, perhaps without rows)."""


def renamed(columns: dict[str, str]) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    """`Adapter.rows` of a dataset whose columns only have other names: published name to ours."""
    return lambda batch: batch.select(list(columns)).rename_columns(list(columns.values()))


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
