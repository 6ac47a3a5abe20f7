"""Synthetic shards of videos, images and texts in the proportions of stage 3. Frames are as large as real ones: 224 px, about 9 KB each."""

from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.small_shards import write_small
from fvlm_core.config import DataSettings, SourceShare
from fvlm_core.data.rows import Kind, Split
from fvlm_core.data.shard_files import ShardSample

SHARES = {"video": 0.46, "image": 0.34, "text": 0.20}
"""SmolVLM2's last stage, with its two kinds of image samples merged."""
WORDS = ["".join(letters) for letters in product("abcdefghijklmnop", repeat=2)]
VAL_CLIPS = 2
"""Validation samples of each kind."""
QUALITY = 90
DETAIL_PX, NOISE = 9, 1.0
"""Coarse patches and fine noise that give JPEGs the size of real video frames."""


def mixed_data(**changes) -> DataSettings:
    """Return the data settings of a run on these shards."""
    return DataSettings(mixture=[SourceShare(source=name, share=share) for name, share in SHARES.items()], **changes)


def write_mixed(folder: Path, *, clips: int, frame_px: int = 224, samples_per_shard: int = 50) -> Path:
    """Write `clips` videos of 4 to 64 frames, as many images and as many texts for training, and a few of each for validation."""
    rng = np.random.default_rng(0)
    kinds: tuple[Kind, ...] = ("video", "image", "text")
    counts: dict[Split, int] = {"train": clips, "val": VAL_CLIPS}
    samples = [_sample(rng, kind, split, n, frame_px) for split, count in counts.items() for kind in kinds for n in range(count)]
    return write_small(folder, samples, identity="benchmark", frame_px=frame_px, tokens=512, samples_per_shard=samples_per_shard)


def _sample(rng: np.random.Generator, kind: Kind, split: Split, number: int, frame_px: int) -> ShardSample:
    frames = {"video": int(rng.integers(4, 65)), "image": 1, "text": 0}[kind]
    length = int(rng.integers(40, 400 if kind == "text" else 200))
    words = rng.choice(WORDS, length)
    turn = {"question": " ".join(words[: length // 2]), "answer": " ".join(words[length // 2 :])}
    return ShardSample(
        source=kind,
        kind=kind,
        split=split,
        origin=f"{kind}-{split}-{number}",
        conversations=[[turn]],
        probes=[None],
        duration_s=float(frames),
        num_frames=frames,
        frames=_pictures(int(rng.integers(2**31)), frames, frame_px),
    )


def _pictures(seed: int, frames: int, frame_px: int) -> Callable[[], Sequence[bytes]]:
    def draw() -> list[bytes]:
        rng, files = np.random.default_rng(seed), []
        for _ in range(frames):
            coarse = Image.fromarray(rng.integers(0, 256, (DETAIL_PX, DETAIL_PX, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((frame_px, frame_px), Image.Resampling.BICUBIC), np.float32)
            noisy = smooth + rng.normal(0, NOISE, (frame_px, frame_px, 1)).astype(np.float32)
            out = BytesIO()
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=QUALITY)
            files.append(out.getvalue())
        return files

    return draw
