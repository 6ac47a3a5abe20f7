"""ShareGPT4Video: `sharegpt4video_40k.jsonl` of {video_id, video_path, zip_folder, captions: [{idx, content}], ...}, videos in zips.

The entry with idx -1 is the caption of the whole video; the others describe sliding windows and are not used. Give the zips as `archives`.
"""

import pyarrow as pa

from fvlm_core.data.sources.adapter import ROW_NUMBER, Adapter, Published
from fvlm_core.data.sources.turns import batch_of

COMPLETE = "-1"


def rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a row per video with a caption of the whole video."""
    made = []
    for number, (path, captions) in enumerate(
        zip(batch.column("video_path").to_pylist(), batch.column("captions").to_pylist(), strict=True)
    ):
        words = [(one["content"] or "").strip() for one in captions or () if str(one["idx"]) == COMPLETE]
        if path and any(words):
            made.append({ROW_NUMBER: number, "url": path, "caption": words[-1]})
    return batch_of(made)


ADAPTER = Adapter(
    name="sharegpt4video",
    title="ShareGPT4Video",
    kind="video",
    prompt="What would be the ShareGPT4Video caption for this video?",
    homepage="https://huggingface.co/datasets/ShareGPT4Video/ShareGPT4Video",
    licence="CC-BY-NC-4.0",
    citation="Chen et al. 2024, ShareGPT4Video: Improving Video Understanding and Generation with Better Captions, arXiv:2406.04325",
    required=("video_path", "captions"),
    rows=rows,
    published=Published(samples=40_178, gigabytes=None, hours=291.0, source="arXiv:2406.04325"),
)
