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


def turns_of(messages: Any, *, role: str = "role", text: str = "content") -> list[Turn] | None:
    """Question and answer pairs of messages like `{role: user, content: ...}`; None unless both take turns and say something."""
    said = _said(messages, role, text)
    roles = [ROLES.get(who) for who, _ in said or ()]
    if not said or roles != ["user", "assistant"] * (len(roles) // 2):
        return None
    return pairs([words for _, words in said[::2]], [words for _, words in said[1::2]])


def _said(messages: Any, role: str, text: str) -> list[tuple[str, str]] | None:
    """Who says what; None for what is no list of messages. One that JSON has in a file with others of another form comes as its text."""
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
        turns = turns_of(record["conversations"], role="from", text="value")
        asked = pairs([PLACEHOLDER.sub("\n", turn["question"]).strip() for turn in turns or ()], [turn["answer"] for turn in turns or ()])
        if found and asked:
            url = found if isinstance(found, str) else found[0] if len(found) == 1 else json.dumps(found)
            rows.append({OF: number, "url": url, "conversations": conversations(asked)})
    return batch_of(rows)
