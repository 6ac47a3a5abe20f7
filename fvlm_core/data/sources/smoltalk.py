"""SmolTalk and datasets like it: parquet or jsonl with `messages`, a list of {role, content}.

A chat with a system message of its own is left out, since every sample has ours.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fvlm_core.errors import UserError


def read_chats(path: Path) -> Iterator[list[dict[str, str]]]:
    """Chats as turns of {question, answer}, in file order. Raises UserError if the file is missing or has another schema."""
    try:
        for messages in _messages(path):
            turns = _turns(messages)
            if turns:
                yield turns
    except FileNotFoundError as error:
        raise UserError("the file of chats does not exist", where=str(path), fix="check the path") from error
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"not a file of chats: {error}", where=str(path), fix="give a .parquet or .jsonl with `messages`, a list of {role, content}"
        ) from error


def _messages(path: Path) -> Iterator[list[dict[str, str]]]:
    if path.suffix == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches(columns=["messages"]):
            yield from batch.column(0).to_pylist()
    elif path.suffix == ".jsonl":
        with path.open() as lines:
            for line in lines:
                yield json.loads(line)["messages"]
    else:
        raise ValueError(f"its suffix is {path.suffix!r}")


def _turns(messages: list[dict[str, Any]]) -> list[dict[str, str]] | None:
    """Question and answer pairs, or None unless users and assistants take turns and nobody is silent."""
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not all(message["content"].strip() for message in messages):
        return None
    return [
        {"question": user["content"].strip(), "answer": assistant["content"].strip()}
        for user, assistant in zip(messages[::2], messages[1::2], strict=True)
    ]
