"""Readers of JSON files, a batch of records at a time: a file with a list of records (`.json`), or a record a line (`.jsonl`)."""

import json
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

RECORDS = 2048
"""In a batch."""
BLOCK_CHARACTERS = 1 << 20

Records = Iterator[dict[str, Any]]


def read_json(path: Path, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
    """Those of the `columns` that any record has had so far; a record that lacks one has null. At least one batch.

    Raises ValueError for what is not such a file.
    """
    with path.open(encoding="utf-8-sig") as stream:
        yield from batches_of(_lines(stream) if path.suffix == ".jsonl" else _items(stream), columns)


def batches_of(records: Records, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
    """Records as batches, as `read_json` gives them."""
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
    """A column; values of several types, or integers beyond 64 bits, as their JSON text."""
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
    """The items of a JSON list, or the objects that follow one another, without ever holding all of the file."""
    decoder = json.JSONDecoder()
    text, place, listed, more = "", 0, False, True
    begun = ended = False  # an item, or the list
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
        block = stream.read(max(BLOCK_CHARACTERS, len(text) - place))  # doubles for an item of many blocks
        text, place, more = text[place:] + block, 0, bool(block)
