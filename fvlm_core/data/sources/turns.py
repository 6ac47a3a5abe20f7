"""Chats as datasets publish them, to the turns of our rows."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from fvlm_core.data.sources.adapter import OF

Turn = dict[str, str]
PLACEHOLDER = re.compile(r"\s*<(?:image|video)>\s*")
"""Where LLaVA's format shows the picture; ours has its own rule for that."""
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def turns_of(messages: Sequence[dict[str, Any]] | None, *, role: str = "role", text: str = "content") -> list[Turn] | None:
    """Question and answer pairs of messages like `{role: user, content: ...}`; None unless both take turns and say something."""
    roles = [ROLES.get(str(message[role])) for message in messages or ()]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        return None
    texts = [(message[text] or "").strip() for message in messages or ()]
    return pairs(texts[::2], texts[1::2])


def pairs(questions: Sequence[str], answers: Sequence[str]) -> list[Turn] | None:
    """Questions with their answers; None where there are none, or one is empty."""
    if not questions or not all([*questions, *answers]):
        return None
    return [{"question": question, "answer": answer} for question, answer in zip(questions, answers, strict=True)]


def conversations(*chats: Sequence[Turn] | None) -> str:
    """The column `conversations` of a row: the chats that there are."""
    return json.dumps([list(chat) for chat in chats if chat])


def batch_of(rows: Sequence[dict[str, Any]]) -> pa.RecordBatch:
    """Rows, each with the place of its published row in `OF`; texts that a row lacks are empty."""
    names = dict.fromkeys(name for row in rows for name in row if name != OF)
    columns: dict[str, Any] = {name: pa.array([row.get(name) or "" for row in rows], pa.string()) for name in names}
    return pa.RecordBatch.from_pydict(columns | {OF: pa.array([row[OF] for row in rows], pa.int64())})


def llava_rows(batch: pa.RecordBatch, media: Sequence[str]) -> pa.RecordBatch:
    """Rows of LLaVA's format: `conversations` of {from: human or gpt, value}, and the file's name in one of the columns `media`.

    What has no file, or is not question and answer in turn, is left out. Several files of one sample become a JSON list.
    """
    names = [name for name in media if name in batch.schema.names]
    rows = []
    for number, record in enumerate(batch.select(["conversations", *names]).to_pylist()):
        found = next((record[name] for name in names if record[name]), None)
        said = [{"from": one["from"], "value": PLACEHOLDER.sub("\n", one["value"] or "")} for one in record["conversations"] or ()]
        turns = turns_of(said, role="from", text="value")
        if found and turns:
            url = found if isinstance(found, str) else found[0] if len(found) == 1 else json.dumps(found)
            rows.append({OF: number, "url": url, "conversations": conversations(turns)})
    return batch_of(rows)
