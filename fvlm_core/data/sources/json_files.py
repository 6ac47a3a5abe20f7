"""Reads JSON files in batches of records: a list of records (`.json`), or one record per line (`.jsonl`)."""

import json
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

RECORDS = 2048
"""Records per batch."""
BLOCK_CHARACTERS = 1 << 20

Records = Iterator[dict[str, Any]]


def read_json(path: Path, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
    """Yield at least one batch with those of `columns` that any record had so far; a record without one gets null.

    Raises ValueError for a file in another format.
    """
    with path.open(encoding="utf-8-sig") as stream:
        yield from batches_of(_lines(stream) if path.suffix == ".jsonl" else _items(stream), columns)


def batches_of(records: Records, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
    """Yield records as batches, like `read_json`."""
    seen: dict[str, None] = {}
    empty = True
    while some := list(islice(records, RECORDS)):
        for record in some:
            if not isinstance(record, dict):
                raise ValueError(f"a record is {type(record).__name__}, not an object")
            seen |= dict.fromkeys(name for name in columns if name in record)
        empty = False
        yield pa.RecordBatch.from_pydict({name: _array([record.get(name) for record in some]) for name in seen})
    if empty:
        yield pa.RecordBatch.from_pydict({})


def _array(values: list[Any]) -> pa.Array:
    """Return a column. Values of mixed types, or integers beyond 64 bits, become JSON text."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        texts = [None if value is None else value if isinstance(value, str) else json.dumps(value) for value in values]
        return pa.array(texts, pa.string())


def _lines(stream: TextIO) -> Records:
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _items(stream: TextIO) -> Records:
    """Yield the items of a JSON list, or consecutive objects, without holding the whole file in memory."""
    decoder = json.JSONDecoder()
    text, place, listed, more = "", 0, False, True
    begun = ended = False  # whether an item or the list has begun, and the list has ended
    while True:
        while place < len(text) and (text[place].isspace() or (listed and text[place] == ",")):
            place += 1
        if place < len(text):
            if ended:
                raise ValueError("something follows the file's list")
            if text[place] == "[" and not begun:
                listed, begun, place = True, True, place + 1
                continue
            if listed and text[place] == "]":
                ended, place = True, place + 1
                continue
            try:
                item, place = decoder.raw_decode(text, place)
                begun = True
                yield item
                continue
            except ValueError:
                if not more:
                    raise
        elif not more:
            if listed and not ended:
                raise ValueError("the file ends within its list")
            return
        block = stream.read(max(BLOCK_CHARACTERS, len(text) - place))  # doubles for an item of several blocks
        text, place, more = text[place:] + block, 0, bool(block)
