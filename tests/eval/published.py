"""Small folders in the form in which benchmarks are published, with real mp4 files and pictures."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fvlm_core.data.clips import encode_mp4

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def mp4(path: Path, seconds: int = 3, *, seed: int = 0) -> Path:
    """A video whose every second is one grey."""
    greys = np.random.default_rng([seed, seconds]).integers(0, 256, seconds)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_mp4(np.repeat(greys, 64 * 48 * 3).reshape(seconds, 48, 64, 3).astype(np.uint8)))
    return path


def png(grey: int = 100, size: tuple[int, int] = (60, 40)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (grey, grey, grey)).save(stream, "PNG")
    return stream.getvalue()


def picture(grey: int = 100) -> dict[str, Any]:
    """As Hugging Face's datasets keep one."""
    return {"bytes": png(grey), "path": f"{grey}.png"}


def parquet(path: Path, rows: list[dict[str, Any]], *, pictures: tuple[str, ...] = (), group: int = 2) -> Path:
    """A parquet file with row groups of `group` rows; columns in `pictures` hold pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [pa.array([row.get(name) for row in rows], PICTURE if name in pictures else None) for name in names]
    pq.write_table(pa.table(columns, names=names), path, row_group_size=group)
    return path


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def videomme_row(video: str, number: int, **changes: Any) -> dict[str, Any]:
    row = {"video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Humanity & History", "url": "https://y/x"}
    row |= {"videoID": video, "question_id": f"{video}-{number}", "task_type": "Counting Problem", "question": "How many?"}
    row |= {"options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. U.S. flags."], "answer": "C"}
    return row | changes
