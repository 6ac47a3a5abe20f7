"""Turns a dataset's batches into complete rows: filters, defaults and checks, by column wherever pyarrow can."""

import json
import re
from collections.abc import Sequence
from typing import Annotated, Self, cast

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from fvlm_core.data.arrow import pc
from fvlm_core.data.jobs import Condition
from fvlm_core.data.rows import COLUMNS, JSON_COLUMNS, SAMPLE_FIELDS, SCHEMA, SOURCE_PATTERN, SPLITS
from fvlm_core.data.sources import ADAPTERS
from fvlm_core.data.sources.adapter import Adapter


class TurnText(BaseModel):
    """A question and its answer, and optionally a rejected answer."""

    model_config = ConfigDict(extra="forbid")
    question: str
    answer: str
    rejected: str = ""


class Probe(BaseModel):
    """The multiple-choice question of a conversation. Further fields are allowed."""

    model_config = ConfigDict(extra="allow")
    task: str
    choices: Annotated[list[str], Field(min_length=2)]
    answer_index: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.answer_index >= len(self.choices):
            raise ValueError(f"answer_index is {self.answer_index}, but the {len(self.choices)} choices are counted from 0")
        return self


CONVERSATIONS = TypeAdapter(list[list[TurnText]])
PROBES = TypeAdapter(list[Probe | None])
NO_PROBE, NO_EXTRA = "[null]", "{}"


class RowError(Exception):
    """Rows that cannot be used. `rows` are their indexes in the batch; `values` are the offending values, if they help."""

    def __init__(self, what: str, rows: Sequence[int], *, values: Sequence[str] = (), fix: str) -> None:
        super().__init__(what)
        self.what, self.rows, self.values, self.fix = what, rows, values, fix


class FilterError(Exception):
    """A condition that cannot be checked on these columns."""


def meets(batch: pa.RecordBatch, conditions: Sequence[Condition]) -> pa.Array:
    """Return whether each row meets every condition, bool [rows]. Raises FilterError."""
    met = pa.array([True] * batch.num_rows, pa.bool_())
    for condition in conditions:
        if condition.column not in batch.schema.names:
            raise FilterError(f"there is no column {condition.column!r}")
        column = batch.column(condition.column)
        if condition.min is not None or condition.max is not None:
            numbers = _numbers(column, condition.column)
            if condition.min is not None:
                met = pc.and_kleene(met, pc.greater_equal(numbers, condition.min))
            if condition.max is not None:
                met = pc.and_kleene(met, pc.less_equal(numbers, condition.max))
        if condition.one_of is not None:
            texts = isinstance(condition.one_of[0], str)
            values = _texts(column) if texts else _numbers(column, condition.column)
            met = pc.and_kleene(met, pc.is_in(values, pa.array(condition.one_of, pa.string() if texts else pa.float64())))
    return pc.fill_null(met, False)


def complete(batch: pa.RecordBatch, adapter: Adapter, name: str) -> pa.RecordBatch:
    """Return rows of SCHEMA with all defaults, for a source called `name`. Raises RowError for invalid values."""
    columns = {column: _column(batch, column) for column in COLUMNS}
    columns["source"] = _filled(columns["source"], name)
    columns["kind"] = _filled(columns["kind"], adapter.kind)
    kinds = ["text"] if adapter.kind == "text" else ["video", "image"]
    _require(columns["source"], pc.match_substring_regex(columns["source"], SOURCE_PATTERN), "source", "lower-case letters, digits and _")
    _require(columns["kind"], pc.is_in(columns["kind"], pa.array(kinds)), "kind", " or ".join(kinds))
    _require(columns["split"], pc.is_in(columns["split"], pa.array(["", *SPLITS])), "split", "train, val or empty")
    given = [pc.not_equal(columns[column], "") for column in JSON_COLUMNS]
    plain = pc.invert(pc.or_(pc.or_(given[0], given[1]), given[2]))
    asked = pc.equal(columns["conversations"], "")
    captions = _caption_conversations(columns["caption"].filter(asked), columns["source"].filter(asked), adapter)
    columns["conversations"] = pc.replace_with_mask(columns["conversations"], asked, captions)
    columns["probes"] = pc.if_else(plain, NO_PROBE, columns["probes"])
    columns["extra"] = _filled(columns["extra"], NO_EXTRA)
    _check_json(columns, pc.indices_nonzero(pc.invert(plain)))
    return pa.RecordBatch.from_arrays([columns[column] for column in COLUMNS], schema=SCHEMA)


def prompt_of(source: str, adapter: Adapter) -> str:
    """Return the question to which a caption is the answer: that of the dataset with the source's name, else that of the format."""
    named = ADAPTERS.get(source)
    return named.prompt if named and named.prompt else adapter.prompt


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    if name not in batch.schema.names:
        return pa.array([""] * batch.num_rows, pa.string())
    return pc.fill_null(pc.utf8_trim_whitespace(_texts(batch.column(name))), "")


def _texts(column: pa.Array) -> pa.Array:
    return column if pa.types.is_string(column.type) else column.cast(pa.string())


def _filled(column: pa.Array, default: str) -> pa.Array:
    return pc.if_else(pc.equal(column, ""), default, column)


def _numbers(column: pa.Array, name: str) -> pa.Array:
    try:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            trimmed = pc.utf8_trim_whitespace(column)
            column = pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, trimmed.type), trimmed)
        return column.cast(pa.float64())
    except pa.ArrowException as error:
        raise FilterError(f"the column {name!r} holds no numbers: {error}") from error


def _require(column: pa.Array, allowed: pa.Array, name: str, fix: str) -> None:
    wrong = pc.indices_nonzero(pc.invert(allowed))
    if len(wrong):
        values = [repr(value) for value in column.take(wrong).to_pylist()]
        raise RowError(f"a {name} that is not allowed", wrong.to_pylist(), values=values, fix=f"use {fix}")


def _caption_conversations(captions: pa.Array, sources: pa.Array, adapter: Adapter) -> pa.Array:
    """Return `[[{"question": PROMPT, "answer": CAPTION}]]` for each row, as `json.dumps` writes it."""
    encoded = cast(pa.DictionaryArray, sources.dictionary_encode())
    prompts = pa.array([json.dumps(prompt_of(source, adapter)) for source in encoded.dictionary.to_pylist()], pa.string())
    answers = pa.array([json.dumps(caption) for caption in captions.to_pylist()], pa.string())
    questions = prompts.take(encoded.indices)
    return pc.binary_join_element_wise('[[{"question": ', questions, ', "answer": ', answers, "}]]", "")


def _check_json(columns: dict[str, pa.Array], rows: pa.Array) -> None:
    """Check JSON_COLUMNS of the given rows, and fill in missing probes."""
    if not len(rows):
        return
    probes: list[str] = []
    chosen = [columns[name].take(rows).to_pylist() for name in JSON_COLUMNS]
    for row, conversations_json, probes_json, extra_json in zip(rows.to_pylist(), *chosen, strict=True):
        try:
            conversations = CONVERSATIONS.validate_json(conversations_json)
            probes.append(probes_json or json.dumps([None] * len(conversations)))
            if len(PROBES.validate_json(probes[-1])) != len(conversations) or not conversations or not all(conversations):
                raise ValueError("every conversation needs a turn and a probe or null")
            extra = json.loads(extra_json)
            if not isinstance(extra, dict):
                raise ValueError("extra must be a JSON object")
            if own := [name for name in SAMPLE_FIELDS if name in extra]:
                raise ValueError(f"extra has {', '.join(own)}, which every sample already has")
        except (ValidationError, ValueError) as error:
            reason = re.sub(r"\s*\n\s*", "; ", str(error))
            fix = "see the columns in fvlm_core/data/sources/user.py"
            raise RowError(f"conversations, probes or extra are wrong: {reason}", [row], fix=fix) from error
    mask = pa.array([False] * len(columns["probes"])).to_numpy(zero_copy_only=False).copy()
    mask[rows.to_numpy()] = True
    columns["probes"] = pc.replace_with_mask(columns["probes"], pa.array(mask), pa.array(probes, pa.string()))
