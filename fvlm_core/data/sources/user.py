"""A table of videos or images of one's own: csv, parquet or jsonl, with the columns `url` and `caption` and optional ones.

| column | meaning | default |
|---|---|---|
| source | lower-case name of the source | the name in the profile |
| kind | video or image (a still) | video |
| split | train, val, or empty: decided by a hash of its frames | empty |
| conversations | a list of conversations, each a list of {question, answer}; the last may have {rejected} too, an answer \
that is worse. With it, `caption` may be left out | the source's prompt and the caption |
| probes | per conversation null or {task, choices, answer_index (from 0)} and what else it is to carry | null |
| extra | further fields of the sample; not `key`, `source` and the others that every sample has | {} |

A `url` is an http(s) address or a file: `file:///...`, an absolute path, one that starts at the table's folder (or at `media`), or the name
of a file in one of the source's `archives`. `#t=10,20` at its end means these seconds of the video. Several images of one sample are a list
of files. A parquet file may hold the media itself, in a column `media`: bytes, {bytes, path}, or a list of them.

Lists and objects are JSON text, or in parquet and jsonl lists and objects.
"""

import json
from typing import Any

import pyarrow as pa

from fvlm_core.data.rows import COLUMNS, REQUIRED
from fvlm_core.data.sources.adapter import DEFAULT_PROMPT, Adapter

MEDIA = "media"


def rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows, lists and objects as JSON."""
    columns = {name: batch.column(name) for name in batch.schema.names if name in COLUMNS}
    for name, column in columns.items():
        if pa.types.is_nested(column.type):
            texts = [None if value is None else json.dumps(_without_nulls(value)) for value in column.to_pylist()]
            columns[name] = pa.array(texts, pa.string())
    return pa.RecordBatch.from_pydict(columns) if columns else batch


def _without_nulls(value: Any) -> Any:
    """Columns of objects give every object the fields of all: those that are null were not there. Nulls in lists stay."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


ADAPTER = Adapter(
    name="user",
    title="A table of one's own",
    kind="video",
    prompt=DEFAULT_PROMPT,
    homepage="",
    licence="the owner's",
    citation="",
    required=REQUIRED,
    instead={"url": (MEDIA,), "caption": ("conversations",)},
    optional=tuple(name for name in COLUMNS if name not in REQUIRED),
    embedded=(MEDIA,),
    rows=rows,
)
