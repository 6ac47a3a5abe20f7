"""RLAIF-V: pairs of a chosen and a rejected answer to a question about an image, for direct preference optimization.

Two layouts are published. `openbmb/RLAIF-V-Dataset`: `image`, `question`, `chosen` and `rejected` as text.
`HuggingFaceH4/rlaif-v_formatted`: `images`, and `prompt`, `chosen`, `rejected` as lists of {role, content: [{type, text}]}.
"""

import json
from typing import Any

import pyarrow as pa

from fvlm_core.data.sources.adapter import ROW_NUMBER, Adapter, Published
from fvlm_core.data.sources.turns import batch_of


def rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a row per pair. Pairs with an empty text, or with two equal answers, are left out."""
    question = "question" if "question" in batch.schema.names else "prompt"
    made = []
    for number, record in enumerate(batch.select([question, "chosen", "rejected"]).to_pylist()):
        asked, chosen, rejected = (_text(record[name]) for name in (question, "chosen", "rejected"))
        if asked and chosen and rejected and chosen != rejected:
            pair = {"question": asked, "answer": chosen, "rejected": rejected}
            made.append({ROW_NUMBER: number, "conversations": json.dumps([[pair]])})
    return batch_of(made)


def _text(said: str | list[dict[str, Any]] | None) -> str:
    """Return the text in either layout, without placeholders for the image."""
    if said is None or isinstance(said, str):
        return (said or "").strip()
    parts = [part for message in said for part in message["content"]]
    return "\n".join(part["text"] for part in parts if part["type"] == "text" and part["text"]).strip()


ADAPTER = Adapter(
    name="rlaif_v",
    title="RLAIF-V",
    kind="image",
    prompt="",
    homepage="https://huggingface.co/datasets/openbmb/RLAIF-V-Dataset",
    licence="CC-BY-NC-4.0",
    citation="Yu et al. 2024, RLAIF-V: Aligning MLLMs through Open-Source AI Feedback for Super GPT-4V Trustworthiness, arXiv:2405.17220",
    required=("question", "chosen", "rejected"),
    instead={"question": ("prompt",)},
    embedded=("images", "image"),
    rows=rows,
    published=Published(samples=83_132, gigabytes=12.0, hours=None, source="the dataset cards: 78,975 and 4,157 rows formatted"),
)
