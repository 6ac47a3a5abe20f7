"""SmolTalk and datasets like it: parquet or jsonl with `messages`, a list of {role, content}.

A chat with a system message of its own is left out, since every sample has ours.
"""

import json
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from fvlm_core.data.sources.adapter import KEEP, Adapter, read_table

LINES = 4096
"""Of a jsonl file, read at a time."""


def read(path: Path, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
    """As `read_table`, of a parquet or jsonl file. Raises ValueError for another."""
    if path.suffix == ".jsonl":
        with path.open() as lines:
            while some := list(islice(lines, LINES)):
                records = [json.loads(line) for line in some]
                yield pa.RecordBatch.from_pydict({name: [record.get(name) for record in records] for name in columns})
    elif path.suffix == ".parquet":
        yield from read_table(path, columns)
    else:
        raise ValueError(f"its suffix is {path.suffix!r}, not .parquet or .jsonl")


def rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A row per chat; one that is not of turns of a user and an assistant is left out."""
    chats = [_turns(messages) for messages in batch.column("messages").to_pylist()]
    conversations = ["" if turns is None else json.dumps([turns]) for turns in chats]
    return pa.RecordBatch.from_pydict({"conversations": conversations, KEEP: [turns is not None for turns in chats]})


def _turns(messages: list[dict[str, Any]]) -> list[dict[str, str]] | None:
    """Question and answer pairs, or None unless users and assistants take turns and nobody is silent."""
    roles = [message["role"] for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) or not all(message["content"].strip() for message in messages):
        return None
    return [
        {"question": user["content"].strip(), "answer": assistant["content"].strip()}
        for user, assistant in zip(messages[::2], messages[1::2], strict=True)
    ]


ADAPTER = Adapter(
    name="smoltalk",
    title="SmolTalk",
    kind="text",
    prompt="",
    homepage="https://huggingface.co/datasets/HuggingFaceTB/smoltalk",
    licence="Apache-2.0",
    citation="Allal et al. 2025, SmolLM2: When Smol Goes Big: Data-Centric Training of a Small Language Model, arXiv:2502.02737",
    required=("messages",),
    rows=rows,
    read=read,
)
