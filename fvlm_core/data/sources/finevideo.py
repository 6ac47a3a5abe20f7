"""FineVideo: parquet with complete films in `mp4` (bytes) and a struct `json` about each: a description, questions and answers, scenes.

Each film has one conversation that asks for its description, and another with the published questions. The format `finevideo_scenes`
has descriptions per scene. Filters may use the simple fields of `json`, such as `content_parent_category` or `duration_seconds`.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from fvlm_core.data.arrow import pc
from fvlm_core.data.sources.adapter import ROW_NUMBER, Adapter, Published, read_table
from fvlm_core.data.sources.turns import batch_of, conversations, pairs

ABOUT, METADATA = "json", "content_metadata"
PROMPT = "What would be the FineVideo description of this video?"


def read(path: Path, columns: Collection[str], embedded: Collection[str] = ()) -> Iterator[pa.RecordBatch]:
    """Like `read_table`, with the struct's metadata as `json`, and its other requested fields as columns."""
    for batch in read_table(path, columns, embedded):
        if ABOUT not in batch.schema.names or METADATA not in _fields(batch.schema.field(ABOUT).type):
            if ABOUT in batch.schema.names:
                raise ValueError(f"the column {ABOUT} has no field {METADATA}")
            yield batch
            continue
        about = batch.column(ABOUT)
        found = {name: batch.column(name) for name in batch.schema.names}
        found |= {name: pc.struct_field(about, name) for name in _fields(about.type) if name in columns}
        yield pa.RecordBatch.from_pydict(found | {ABOUT: pc.struct_field(about, METADATA)})


def rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a row per film. Films with neither a description nor questions are left out."""
    made = []
    for number, about in enumerate(batch.column(ABOUT).to_pylist()):
        about = about or {}
        description = (about.get("description") or "").strip()
        asked: list[dict[str, Any]] = about.get("qAndA") or []
        questions = pairs([(one["question"] or "").strip() for one in asked], [(one["answer"] or "").strip() for one in asked])
        described = pairs([PROMPT], [description])
        if described or questions:
            made.append({ROW_NUMBER: number, "caption": description, "conversations": conversations(described, questions)})
    return batch_of(made)


def _fields(kind: pa.DataType) -> list[str]:
    return [kind.field(number).name for number in range(kind.num_fields)] if pa.types.is_struct(kind) else []


ADAPTER = Adapter(
    name="finevideo",
    title="FineVideo",
    kind="video",
    prompt=PROMPT,
    homepage="https://huggingface.co/datasets/HuggingFaceFV/finevideo",
    licence="CC-BY, of each video's author; FineVideo's terms of use",
    citation="Farré, Marafioti, Tunstall, von Werra and Wolf 2024, FineVideo, Hugging Face",
    required=(ABOUT,),
    embedded=("mp4",),
    rows=rows,
    read=read,
    published=Published(samples=43_751, gigabytes=600.0, hours=3425.0, source="the dataset card"),
)
