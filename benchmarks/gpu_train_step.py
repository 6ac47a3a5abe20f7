"""The training step on a GPU at DINOv2-small + SmolLM2 135M, 360M and 1.7B: samples/s, MFU, peak memory and data wait.

Measured eager, compiled and autotuned, each with the largest batch that fits (found by doubling). It runs the trainer itself in bf16 with
fp32 master weights, on shards written for it: videos of 4, 8, 8 and 16 frames of 224 px, with texts of the lengths in
`benchmarks.train_step`, read and decoded by loader processes. Goals: MFU of 40 % at 135M and 50 % at 1.7B, and at most 2 % of the time
waiting for data.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice, product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import simplejpeg
import torch

from benchmarks.kernels import Kind
from benchmarks.report import Measurement, arguments, show
from benchmarks.shapes import FRAME_PX, SMOLLM2, VOCABULARY, model_settings
from benchmarks.small_shards import write_small
from fvlm_core.config import ModelSettings, Recipe
from fvlm_core.data.rows import SPLITS
from fvlm_core.data.shard_files import ShardSample
from fvlm_core.train.bench import Bench
from fvlm_core.train.jobs import SpeedJob, SpeedRow

NO_GPU = 2
"""Exit status on a machine without CUDA."""
GOAL_MFU = {"135M": 0.40, "1.7B": 0.50}
GOAL_WAIT = 0.02
FRAMES, WORDS = (4, 8, 8, 16), (24, 48, 96, 200)
"""Frames and words of the four kinds of sample; half of the words are the answer."""
VIDEOS = 64
"""Videos of each kind, all with different frames, so that no batch below 256 samples repeats frames and saves work."""
SMALLEST_BATCH = 4
WHOLE_BATCH = {"frames": 1_000_000, "tokens": 100_000_000}
"""Micro-batch budgets that no batch reaches, so that a step is a single forward."""
DICTIONARY = 200
"""Number of different words; each is one token of the shards' tokenizer."""


@dataclass(frozen=True)
class Filled:
    """The largest batch that fits, for one model and kind."""

    size: str
    kind: Kind
    batch: int
    row: SpeedRow


def main() -> None:
    options = arguments(
        __doc__ or "",
        sizes={"nargs": "+", "choices": list(SMOLLM2), "default": list(SMOLLM2)},
        steps={"type": int, "default": 10},
        workers={"type": int, "default": max(1, min(12, (os.cpu_count() or 1) - 1))},
    )
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU, and torch sees none here; `python -m benchmarks.train_step` runs on a CPU", file=sys.stderr)
        sys.exit(NO_GPU)
    with tempfile.TemporaryDirectory() as folder:
        shards = write_videos(Path(folder) / "shards", frame_px=FRAME_PX, videos=VIDEOS, vocabulary=VOCABULARY)
        jobs = {
            size: speed_job(Path(folder) / size, shards, model_settings(size), steps=options.steps, workers=options.workers)
            for size in options.sizes
        }
        found = (filled for size, job in jobs.items() for filled in fill(size, job))
        show(chain.from_iterable(map(measurements, found)), as_json=options.json)


def write_videos(folder: Path, *, frame_px: int, videos: int, vocabulary: int) -> Path:
    """Write shards of random videos and words. `vocabulary` is the number of rows of the model's embedding."""
    rng = np.random.default_rng(0)
    words = ["".join(letters) for letters in islice(product("abcdefghijklmnopqrstuvwxyz", repeat=2), DICTIONARY)]

    def sample(split: Any, number: int) -> ShardSample:
        frames, length = FRAMES[number % len(FRAMES)], WORDS[number % len(WORDS)]
        coarse = rng.integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8)
        repeats = -(-frame_px // 16)  # blocks, because a JPEG of pixel noise would be larger and slower to read than a real one
        pixels = np.ascontiguousarray(coarse.repeat(repeats, 1).repeat(repeats, 2)[:, :frame_px, :frame_px])
        text = rng.choice(words, length)
        turn = {"question": " ".join(text[: length // 2]), "answer": " ".join(text[length // 2 :])}
        return ShardSample(
            source="videos",
            kind="video",
            split=split,
            origin=f"{split}-{number}",
            conversations=[[turn]],
            probes=[None],
            duration_s=float(frames),
            num_frames=frames,
            frames=lambda: [simplejpeg.encode_jpeg(frame, quality=90, colorsubsampling="420") for frame in pixels],
        )

    counts = {"train": videos * len(FRAMES), "val": len(FRAMES)}
    samples = [sample(split, number) for split in SPLITS for number in range(counts[split])]
    return write_small(folder, samples, identity="benchmark", frame_px=frame_px, tokens=1024, vocab_size=vocabulary, samples_per_shard=1000)


def speed_job(folder: Path, shards: Path, model: ModelSettings, *, steps: int, workers: int, **run: Any) -> SpeedJob:
    """Return the job to measure: the trainer with one fine pass and only its loss, as in `benchmarks.train_step`."""
    recipe = Recipe.model_validate(
        {
            "name": "benchmark",
            "output": folder / "run",
            "shards": shards,
            "model": model,
            "data": {"mixture": [{"source": "videos", "share": 1.0}], "question_first": 0.0, "workers": workers},
            "loss": {"coarse": 0.0, "fine": [1.0]},
            "run": {"steps": 1, "precision": "bf16", "wandb": "disabled", **run},
        }
    )
    return SpeedJob(output=folder, recipe=recipe, warmup_steps=3, steps=steps, max_variant_s=120.0)


def fill(size: str, job: SpeedJob, *, largest: int = 4096, kinds: Sequence[Kind] = get_args(Kind)) -> list[Filled]:
    """Double the eager batch until it no longer fits; then search up or down from there, compiled and autotuned."""
    bench = Bench(job)

    found: list[Filled] = []
    for kind in kinds:
        batch, best, too_much = found[-1].batch if found else SMALLEST_BATCH, None, largest + 1
        while SMALLEST_BATCH <= batch < too_much:
            settings = {
                "run.batch_samples": batch,
                "run.micro_batch": WHOLE_BATCH,
                "run.compile": kind != "eager",
                "run.autotune": kind == "autotuned",
            }
            row = bench.measure(f"{size} {kind} {batch}", settings, busy=True)
            print(f"{row.variant}: {row.failure or f'{row.samples_per_s:.1f} samples/s'}", file=sys.stderr)
            if not row.failure:
                best = Filled(size, kind, batch, row)
            too_much = batch if row.failure else too_much
            batch = batch // 2 if best is None else 2 * batch
        found += [best] if best else []
    return found


def measurements(filled: Filled) -> Sequence[Measurement]:
    """Convert to `Measurement`s."""
    row, name = filled.row, f"{filled.size} {filled.kind}"
    goal = GOAL_MFU.get(filled.size)

    def one(metric: str, value: float | None, unit: str, reference: str = "", against: float | None = None) -> list[Measurement]:
        ratio = value / against if value is not None and against else None
        return [] if value is None else [Measurement("gpu_train_step", f"{name} {metric}", value, unit, reference, ratio)]

    return [
        *one("batch", float(filled.batch), "samples"),
        *one("speed", row.samples_per_s, "samples/s"),
        *one("tokens", row.tokens_per_s, "tokens/s"),
        *one("mfu", row.mfu, "of the data sheet's peak", f"goal {goal}" if goal else "", goal),
        *one("share_of_matmul", row.share_of_matmul, "of torch.mm's FLOP/s"),
        *one("gpu_busy", row.gpu_busy, "of the time"),
        *one("peak_memory", row.peak_memory_gb, "GB"),
        *one("data_wait", row.data_wait_share, "of the time", f"goal {GOAL_WAIT}", GOAL_WAIT),
    ]


if __name__ == "__main__":
    main()
