"""A table of videos: csv or parquet with the columns `url` and `caption`, and optional ones for what is asked about a video.

| column | meaning | default |
|---|---|---|
| source | lower-case name of the source | the job's |
| kind | video or image (a still) | video |
| split | train, val, or empty: decided by a hash of the url | empty |
| conversations | JSON: a list of conversations, each a list of {question, answer}; the last may have {rejected} too, an answer \
that is worse | the source's prompt and the caption |
| probes | JSON: per conversation null or {task, choices, answer_index, cells} | null |
| extra | JSON: further fields of the sample | {} |
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fvlm_core.data.jobs import SOURCE_PATTERN, SPLITS
from fvlm_core.data.sources import caption_prompt
from fvlm_core.errors import UserError

COLUMNS: tuple[str, ...] = ("url", "caption", "source", "kind", "split", "conversations", "probes", "extra")
REQUIRED = ("url", "caption")
EXAMPLES = 3
"""Offending rows named in an error."""


class TurnText(BaseModel):
    """A question and its answer, and perhaps one that is worse."""

    model_config = ConfigDict(extra="forbid")
    question: str
    answer: str
    rejected: str = ""


Row = dict[str, str]
"""One video: a text for each of COLUMNS."""

CONVERSATIONS = TypeAdapter(list[list[TurnText]])
PROBES = TypeAdapter(list[dict[str, Any] | None])


def read_videos(path: Path, *, source: str) -> list[Row]:
    """All rows with all of COLUMNS. Raises UserError for whatever is wrong with the file."""
    return with_defaults(read_file(path), path, source=source)


def read_file(path: Path) -> pd.DataFrame:
    """A csv or parquet file as it is. Raises UserError if it is missing, of another kind, or unreadable."""
    readers = {".csv": _read_csv, ".parquet": pd.read_parquet}
    if path.suffix not in readers:
        raise UserError(
            f"a table of videos cannot be a {path.suffix or 'file without suffix'}", where=str(path), fix="give a .csv or .parquet"
        )
    try:
        return readers[path.suffix](path)
    except FileNotFoundError as error:
        raise UserError("the table of videos does not exist", where=str(path), fix="check the path") from error
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pa.ArrowException) as error:
        raise UserError(f"the table of videos cannot be read: {error}", where=str(path), fix="correct or export the file again") from error
    except pd.errors.EmptyDataError:
        return pd.DataFrame()


def with_defaults(frame: pd.DataFrame, path: Path, *, source: str) -> list[Row]:
    """Check a table that came from `path` and fill in what is optional. Raises UserError."""
    missing = [name for name in REQUIRED if name not in frame.columns]
    if missing:
        raise UserError(
            f"the table of videos lacks the column{'s' * (len(missing) > 1)} {' and '.join(missing)}",
            where=f"{path}, which has: {', '.join(map(str, frame.columns)) or 'no columns'}",
            fix="name the columns `url` and `caption`",
        )
    if frame.empty:
        raise UserError("the table of videos has no rows", where=str(path), fix="add rows")
    defaults = {"source": source, "kind": "video"}
    columns = [_texts(frame, name, defaults.get(name, "")) for name in COLUMNS]
    rows: list[Row] = [dict(zip(COLUMNS, values, strict=True)) for values in zip(*columns, strict=True)]
    _require(rows, "source", lambda name: bool(re.fullmatch(SOURCE_PATTERN, name)), path, "lower-case letters, digits and _")
    _require(rows, "kind", {"video", "image"}.__contains__, path, "video or image")
    _require(rows, "split", {"", *SPLITS}.__contains__, path, "train, val or empty")
    return [_checked(row, path, number) for number, row in enumerate(rows)]


def _read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def _texts(frame: pd.DataFrame, name: str, default: str) -> list[str]:
    if name not in frame.columns:
        return [default] * len(frame)
    return [default if value is None or value != value or value == "" else str(value).strip() for value in frame[name].tolist()]


def _require(rows: list[Row], column: str, good: Callable[[str], bool], path: Path, allowed: str) -> None:
    wrong = [number for number, row in enumerate(rows) if not good(row[column])]
    if wrong:
        values = ", ".join(f"{rows[number][column]!r} (row {number + 1})" for number in wrong[:EXAMPLES])
        raise UserError(f"{len(wrong)} rows have a {column} that is not allowed: {values}", where=str(path), fix=f"use {allowed}")


def _checked(row: Row, path: Path, number: int) -> Row:
    """The row with its JSON columns checked and filled in."""
    try:
        if not row["conversations"]:
            row["conversations"] = json.dumps([[{"question": caption_prompt(row["source"]), "answer": row["caption"]}]])
        conversations = CONVERSATIONS.validate_json(row["conversations"])
        row["probes"] = row["probes"] or json.dumps([None] * len(conversations))
        if len(PROBES.validate_json(row["probes"])) != len(conversations) or not all(conversations):
            raise ValueError("every conversation needs a turn and a probe or null")
        row["extra"] = row["extra"] or "{}"
        if not isinstance(json.loads(row["extra"]), dict):
            raise ValueError("extra must be a JSON object")
    except (ValidationError, ValueError) as error:
        where = f"{path}, row {number + 1}"
        raise UserError(
            f"conversations, probes or extra are wrong: {error}", where=where, fix="see the columns in the documentation"
        ) from error
    return row
