"""Read annotation files of benchmarks (Parquet, JSON lines, JSON, CSV, TSV), with clear errors for missing columns.

Images inside Parquet files are not read with the rows: a row stores a reference to its image, which is read when it is decoded.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fvlm_core.errors import UserError
from fvlm_core.eval.items import UnreadableItemError
from fvlm_core.eval.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, relative_key

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")


@dataclass(frozen=True)
class Cell:
    """A reference to an image inside a Parquet file."""

    path: Path
    root: Path
    """The benchmark's folder."""
    group: int
    """Index of the row group."""
    place: int
    """Index of the row within the group."""
    column: str

    def read_bytes(self) -> bytes:
        """The bytes of the image file. Raises OSError if the cell is empty."""
        value = _pictures(self.path, self.group, self.column)[self.place].as_py()
        if not value or not value.get("bytes"):
            raise OSError(0, "the cell holds no picture")
        return value["bytes"]

    @property
    def name(self) -> str:
        """A name that is unique to this cell."""
        return f"{relative_key(self.root, self.path)}:{self.group}:{self.place}:{self.column}"


@lru_cache(maxsize=2)
def _pictures(path: Path, group: int, column: str) -> Any:
    return pq.ParquetFile(path).read_row_group(group, columns=[column]).column(column)


@dataclass(frozen=True)
class Row:
    """One row of an annotation file."""

    values: dict[str, Any]
    file: Path
    number: int
    """Index of the row in its file."""
    root: Path
    """The benchmark's folder, which contains its media."""

    def __getitem__(self, column: str) -> Any:
        """The value of a column. Raises UnreadableItemError if it is missing."""
        value = self.values.get(column)
        if value is None:
            raise UnreadableItemError(f"no {column!r}")
        return value

    def get(self, column: str, default: Any = None) -> Any:
        """The value of a column, or the default if it is missing."""
        value = self.values.get(column)
        return default if value is None else value

    def text(self, column: str) -> str:
        """The value of a column as text. Raises UnreadableItemError if it is missing or empty."""
        value = str(self[column]).strip()
        if not value:
            raise UnreadableItemError(f"{column!r} is empty")
        return value

    def texts(self, column: str) -> list[str]:
        """The value of a column as a list of texts. Raises UnreadableItemError if it is not a non-empty list."""
        value = self[column]
        if not isinstance(value, list | tuple) or not value:
            raise UnreadableItemError(f"{column!r} is no list")
        return [str(one) for one in value]

    def picture(self, column: str) -> Cell | Path | None:
        """The image in a column: a cell of the Parquet file, or the path of a file; None if there is none.

        Raises UnreadableItemError for any other value.
        """
        value = self.values.get(column)
        if value is None or isinstance(value, Cell):
            return value
        if isinstance(value, str) and value:
            return self.root / value
        raise UnreadableItemError(f"{column!r} is no picture")


def annotation_files(root: Path, patterns: Sequence[str], *, where: str) -> list[Path]:
    """The files that match the first pattern with any match, sorted. Raises UserError if no pattern matches."""
    for pattern in patterns:
        if files := sorted(file for file in root.glob(pattern) if file.is_file()):
            return files
    fix = f"give the folder as it is published; looked for: {', '.join(patterns)}"
    raise UserError(f"{where}: no annotation file", where=str(root), fix=fix)


def read_rows(file: Path, root: Path, columns: Sequence[str], *, where: str) -> Iterator[Row]:
    """The rows of a file. Raises UserError if it cannot be read or lacks a column."""
    try:
        if file.suffix == ".parquet":
            yield from _parquet(file, root, columns, where)
            return
        records = _records(file)
    except (OSError, ValueError, pa.ArrowInvalid, csv.Error) as error:
        raise UserError(f"{where}: the file cannot be read: {error}", where=str(file), fix="download it again") from error
    if records:
        _check(columns, {name for record in records for name in record}, file, where)
    yield from (Row(record, file, number, root) for number, record in enumerate(records))


def _records(file: Path) -> list[dict[str, Any]]:
    text = file.read_text()
    if file.suffix == ".jsonl":
        # not `splitlines`: it splits at characters such as U+2028, which JSON may contain unescaped
        values = [json.loads(line) for line in text.split("\n") if line.strip()]
    elif file.suffix == ".json":
        values = json.loads(text)
        values = values.get("data", list(values.values())) if isinstance(values, dict) else values
    else:
        values = list(csv.DictReader(io.StringIO(text), delimiter="\t" if file.suffix == ".tsv" else ","))
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError("it holds no list of records")
    return values


def _parquet(file: Path, root: Path, columns: Sequence[str], where: str) -> Iterator[Row]:
    table = pq.ParquetFile(file)
    schema = table.schema_arrow
    _check(columns, set(schema.names), file, where)
    pictures = [field.name for field in schema if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0]
    shallow = [name for name in schema.names if name not in pictures] + [f"{name}.path" for name in pictures]
    number = 0
    for group in range(table.num_row_groups):
        for place, record in enumerate(table.read_row_group(group, columns=shallow).to_pylist()):
            held = {name: Cell(file, root, group, place, name) if record.get(name) is not None else None for name in pictures}
            yield Row(record | held, file, number, root)
            number += 1


def _check(columns: Sequence[str], found: set[str], file: Path, where: str) -> None:
    """Raise UserError if a required column is missing; `a|b` means that either is enough."""
    missing = [column for column in columns if not found & set(column.split("|"))]
    if missing:
        raise UserError(
            f"{where}: no column {', '.join(column.replace('|', ' or ') for column in missing)}; the file has {', '.join(sorted(found))}",
            where=str(file),
            fix="give the file as it is published, or rename its columns",
        )


def find_media(
    root: Path, name: str, folders: Sequence[str] = ("",), suffixes: Sequence[str] = ("", *VIDEO_SUFFIXES, *IMAGE_SUFFIXES)
) -> Path:
    """The path of the file (or folder) `name`, with any of `suffixes`, in the first of `folders` that contains it.

    If none does, returns the first path that was tried.
    """
    places = [root / folder / f"{name}{suffix}" for folder in folders for suffix in suffixes]
    return next((place for place in places if place.exists()), places[0])
