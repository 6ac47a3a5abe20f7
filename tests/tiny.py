"""A small but complete folder of shards in a few seconds, for tests that need data but not how it came about; and the tests' profile."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import simplejpeg
import yaml

from benchmarks.small_shards import write_small
from fvlm_core.data import gaze
from fvlm_core.data.frames import encode_jpeg
from fvlm_core.data.rows import SPLITS, Split
from fvlm_core.data.shard_files import ShardSample
from fvlm_core.data.text import text_chats
from fvlm_core.data.tiles import tiled

VOCABULARY = 400
PROFILE = Path(__file__).with_name("profile.yaml")
"""The profile that tests use: those that are shipped can change without a test."""


def profile_values() -> dict[str, Any]:
    """The tests' profile as plain values, to be changed freely."""
    return yaml.safe_load(PROFILE.read_text())


def changed(path: str, value: Any) -> dict[str, Any]:
    """The tests' profile with the value at a dotted path, whose last key need not be there yet."""
    values = profile_values()
    *parents, last = path.split(".")
    node: Any = values
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[int(last) if isinstance(node, list) else last] = value
    return values


def precompute_values(folder: Path, urls: list[str], **download: Any) -> dict[str, Any]:
    """The tests' profile with nothing but one source of these clips, whose table is written to `folder`; `download`: its settings."""
    table = folder / "clips.csv"
    pd.DataFrame({"url": urls, "caption": [f"clip {number}" for number in range(len(urls))]}).to_csv(table, index=False)
    values = profile_values()
    values["precompute"] |= {
        "natural": False,
        "vision": None,
        "clips": {"sources": {}},
        "sources": [{"name": "web", "files": [str(table)]}],
        "download": download,
    }
    return values


def tiny_shards(folder: Path, *, clips: int = 24, seed: int = 0) -> Path:
    """Shards of `clips` clips per source and split (gaze_caption, gaze_cell: 3 frames; gaze_image: 1) and as many text chats, 42 px."""
    samples = [
        make(seed, split, number)
        for split in SPLITS
        for make in (gaze_sample("gaze_caption"), gaze_sample("gaze_cell"), gaze_sample("gaze_image"))
        for number in range(clips)
    ]
    samples.extend(
        ShardSample("text", "text", split, f"{split}-{number}", [[turn]], [None]) for split, number, turn in text_chats(seed, clips, clips)
    )
    return write_small(folder, samples, identity=f"tiny {clips} {seed}", frame_px=gaze.FRAME_PX, tokens=VOCABULARY)


def tiled_shards(folder: Path) -> Path:
    """Four clips per split of gaze_caption and as many chats, in frames of 84 px: 9 tiles of 28 px, and a small frame of 42 px."""

    def made(split: Split, number: int) -> ShardSample:
        sample = gaze_sample("gaze_caption")(0, split, number)
        large = (simplejpeg.decode_jpeg(jpeg, "RGB").repeat(2, 0).repeat(2, 1) for jpeg in sample.frames())
        return replace(sample, frames=lambda: [tiled(encode_jpeg(frame), 28, 42) for frame in large])

    samples = [made(split, number) for split in SPLITS for number in range(4)]
    samples += [ShardSample("text", "text", split, f"{split}-{n}", [[turn]], [None]) for split, n, turn in text_chats(0, 4, 4)]
    return write_small(folder, samples, identity="tiled", frame_px=84, tokens=VOCABULARY)


def gaze_sample(source: str):
    """A function (seed, split, number) -> ShardSample of that gaze source."""

    def make(seed: int, split: Split, number: int) -> ShardSample:
        rng = np.random.default_rng([seed, len(source), split == "val", number])
        image = source == "gaze_image"
        caption = source == "gaze_caption"
        clip = gaze.render(rng, split, task="caption" if caption else "cell", frames=1 if image else 3)
        conversations, probes = gaze.questions(clip, rng)
        text = gaze.reading(clip) if image else gaze.caption(clip)
        if caption:
            conversations, probes = [[{"question": "Describe the video.", "answer": text}]], [None]
        return ShardSample(
            source=source,
            kind="image" if image else "video",
            split=split,
            origin=f"{split}-{number}",
            conversations=conversations,
            probes=probes,
            caption=text,
            duration_s=float(len(clip.frames)),
            num_frames=len(clip.frames),
            frames=lambda: [simplejpeg.encode_jpeg(frame, quality=90, colorsubsampling="420") for frame in clip.frames],
        )

    return make
