"""A user's own table of videos or images: csv, parquet or jsonl, with the columns `url` and `caption`, and optional columns.

| column | meaning | default |
|---|---|---|
| source | lower-case name of the source | the name in the profile |
| kind | video or image (a still) | video |
| split | train, val, or empty: a hash of its frames decides | empty |
| conversations | a list of conversations, each a list of {question, answer}; the last turn may also have {rejected}, a \
worse answer. With it, `caption` may be omitted | the source's prompt and the caption |
| probes | for each conversation null or {task, choices, answer_index (from 0)}, with any further fields | null |
| extra | further fields of the sample, other than `key`, `source` and the others that every sample has | {} |

A `url` is an http(s) address or a file: `file:///...`, an absolute path, a path relative to the table's folder (or to `media`), or the name
of a file in one of the source's `archives`. `#t=10,20` at its end selects these seconds of the video. Several images of one sample are a
list of files. A parquet file may contain the media itself, in a column `media`: bytes, {bytes, path}, or a list of them.

Lists and objects are JSON text; parquet and jsonl files may also have native lists and objects.
"""

import json
from typing import Any

import pyarrow as pa

from fvlm_core.data.rows import COLUMNS, REQUIRED
from fvlm_core.data.sources.adapter import DEFAULT_PROMPT, Adapter

MEDIA = "media"


def rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the same rows, with lists and objects as JSON text."""
    columns = {name: batch.column(name) for name in batch.schema.names if name in COLUMNS}
    for name, column in columns.items():
        if pa.types.is_nested(column.type):
            texts = [None if value is None else json.dumps(_without_nulls(value)) for value in column.to_pylist()]
            columns[name] = pa.array(texts, pa.string())
    return pa.RecordBatch.from_pydict(columns) if columns else batch


def _without_nulls(value: Any) -> Any:
    """Drop null fields: in a column of objects, each object gets the fields of all others as null. Nulls in lists stay."""
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
