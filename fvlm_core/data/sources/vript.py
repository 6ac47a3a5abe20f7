"""Vript: per video a `VIDEO_caption.json` of {meta, data: {CLIP: {video_id, clip_id, caption: {content, ...}}}}, many of them in a zip.

Files are those zips, the JSON files from them, or jsonl with a clip or a video per line. A row is a clip. The clips' mp4 files are in
further zips (`vript_long_videos_clips/*.zip`): give those as `archives`. Filters may use `video_id`, `shot_type`,
`camera_movement` and `scene_title`.
"""

import json
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from fvlm_core.data.arrow import pc
from fvlm_core.data.sources.adapter import ROW_NUMBER, Adapter, Published
from fvlm_core.data.sources.json_files import Records, batches_of

ENDING = "_caption.json"


def read(path: Path, columns: Collection[str], embedded: Collection[str] = ()) -> Iterator[pa.RecordBatch]:
    """Yield clips, with the fields of their captions as columns. Raises ValueError for files of another format."""
    yield from batches_of((clip for record in _records(path) for clip in _clips(record)), columns)


def rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a row per clip that has a caption."""
    content = pc.fill_null(pc.utf8_trim_whitespace(batch.column("content").cast(pa.string())), "")
    kept = pc.indices_nonzero(pc.not_equal(content, "")).cast(pa.int64())
    clips, videos = (batch.column(name).cast(pa.string()).take(kept) for name in ("clip_id", "video_id"))
    urls = pc.binary_join_element_wise(videos, "/", clips, ".mp4", "")
    return pa.RecordBatch.from_pydict({"url": urls, "caption": content.take(kept), ROW_NUMBER: kept})


def _records(path: Path) -> Records:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in sorted(name for name in archive.namelist() if name.endswith(ENDING)):
                yield json.loads(archive.read(name))
    elif path.suffix == ".jsonl":
        with path.open() as lines:
            yield from (json.loads(line) for line in lines if line.strip())
    elif path.suffix == ".json":
        yield json.loads(path.read_text())
    else:
        raise ValueError(f"its suffix is {path.suffix!r}, not .zip, .json or .jsonl")


def _clips(record: dict[str, Any]) -> Records:
    for clip in (record.get("data") or {}).values() if "meta" in record else [record]:
        caption = clip.get("caption") or {}
        yield {name: value for name, value in clip.items() if name != "caption"} | (caption if isinstance(caption, dict) else {})


ADAPTER = Adapter(
    name="vript",
    title="Vript",
    kind="video",
    prompt="What would be the Vript caption for this clip?",
    homepage="https://huggingface.co/datasets/Mutonix/Vript",
    licence="academic research only; videos under YouTube's terms",
    citation="Yang et al. 2024, Vript: A Video Is Worth Thousands of Words, arXiv:2406.06040",
    required=("video_id", "clip_id", "content"),
    rows=rows,
    read=read,
    published=Published(samples=420_000, gigabytes=None, hours=1300.0, source="arXiv:2406.06040, rounded"),
)
