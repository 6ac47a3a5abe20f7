"""Converts chats in the formats of published datasets to the turns of our rows."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from fvlm_core.data.sources.adapter import ROW_NUMBER

Turn = dict[str, str]
PLACEHOLDER = re.compile(r"\s*<(?:image|video)>\s*")
"""Marks the image's place in LLaVA's format. It is removed, because our format has its own rule for that."""
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def turns_of(messages: Any, *, role: str = "role", text: str = "content") -> list[Turn] | None:
    """Return question and answer pairs of messages like `{role: user, content: ...}`; None unless roles alternate and no text is empty."""
    said = _said(messages, role, text)
    roles = [ROLES.get(who) for who, _ in said or ()]
    if not said or roles != ["user", "assistant"] * (len(roles) // 2):
        return None
    return pairs([words for _, words in said[::2]], [words for _, words in said[1::2]])


def _said(messages: Any, role: str, text: str) -> list[tuple[str, str]] | None:
    """Return role and text of each message; None for a value that is not a list of messages.

    A list may be given as JSON text, because `read_json` returns columns of mixed types as such.
    """
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError:
            return None
    if not isinstance(messages, list) or not all(isinstance(one, dict) and role in one and text in one for one in messages):
        return None
    if not all(isinstance(one[text], str | None) for one in messages):
        return None
    return [(str(one[role]), (one[text] or "").strip()) for one in messages]


def pairs(questions: Sequence[str], answers: Sequence[str]) -> list[Turn] | None:
    """Return questions with their answers; None if there are none, or if a text is empty."""
    if not questions or not all([*questions, *answers]):
        return None
    return [{"question": question, "answer": answer} for question, answer in zip(questions, answers, strict=True)]


def conversations(*chats: Sequence[Turn] | None) -> str:
    """Return the value of a row's column `conversations`, without empty chats."""
    return json.dumps([list(chat) for chat in chats if chat])


def batch_of(rows: Sequence[dict[str, Any]]) -> pa.RecordBatch:
    """Return the rows as a batch. Each has the index of its published row in `ROW_NUMBER`; missing texts become empty."""
    names = dict.fromkeys(name for row in rows for name in row if name != ROW_NUMBER)
    columns: dict[str, Any] = {name: pa.array([row.get(name) or "" for row in rows], pa.string()) for name in names}
    return pa.RecordBatch.from_pydict(columns | {ROW_NUMBER: pa.array([row[ROW_NUMBER] for row in rows], pa.int64())})


def llava_rows(batch: pa.RecordBatch, media: Sequence[str]) -> pa.RecordBatch:
    """Convert rows in LLaVA's format: `conversations` of {from: human or gpt, value}, and the file's name in one of the columns `media`.

    Rows without a file, or that do not alternate between question and answer, are left out. Several files of one sample become a JSON
    list.
    """
    names = [name for name in media if name in batch.schema.names]
    rows = []
    for number, record in enumerate(batch.select(["conversations", *names]).to_pylist()):
        found = next((record[name] for name in names if record[name]), None)
        turns = turns_of(record["conversations"], role="from", text="value")
        asked = pairs([PLACEHOLDER.sub("\n", turn["question"]).strip() for turn in turns or ()], [turn["answer"] for turn in turns or ()])
        if found and asked:
            url = found if isinstance(found, str) else found[0] if len(found) == 1 else json.dumps(found)
            rows.append({ROW_NUMBER: number, "url": url, "conversations": conversations(asked)})
    return batch_of(rows)
