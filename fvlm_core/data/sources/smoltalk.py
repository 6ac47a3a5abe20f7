"""SmolTalk and datasets like it: parquet or jsonl with `messages`, a list of {role, content}.

Chats with their own system message are left out, because every sample has ours.
"""

import pyarrow as pa

from fvlm_core.data.sources.adapter import ROW_NUMBER, Adapter, Published
from fvlm_core.data.sources.turns import conversations, turns_of


def rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a row per chat. Chats that do not alternate between user and assistant are left out."""
    chats = [turns_of(messages) for messages in batch.column("messages").to_pylist()]
    kept = [number for number, turns in enumerate(chats) if turns]
    return pa.RecordBatch.from_pydict(
        {"conversations": [conversations(chats[number]) for number in kept], ROW_NUMBER: kept},
        schema=pa.schema([("conversations", pa.string()), (ROW_NUMBER, pa.int64())]),
    )


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
    published=Published(
        samples=1_043_917,
        gigabytes=2.1,
        hours=None,
        source="the dataset card: rows and download size of the training split of `all`",
    ),
)
