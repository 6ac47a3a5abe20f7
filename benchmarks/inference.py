"""Inference at DINOv2-small + SmolLM2-135M: 64 frames and a question of 32 tokens in two modes, and a one-hour stream (3,600 frames at 1
FPS).

The floor of the modes is a plain `Dinov2Model` forward over the same frames, which every model that encodes all frames has to pay. The
floor of the stream is the KV cache of one token per frame: its bytes, and the time to read it once. `--frames 0` measures only the stream.
"""

import gc
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch
from transformers import Dinov2Model

from benchmarks.report import Measurement, arguments, resident_gb, show, side_by_side
from benchmarks.shapes import FRAME_PX, NO_TEMPLATE, VOCABULARY, model_settings, video_question
from fvlm_core.model.build import build_model
from fvlm_core.model.flop_counter import count_flops
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.inference import read_batch
from fvlm_core.model.long_cache import LongCache
from fvlm_core.serve.stream import FrameStream

ORIGINAL_GFLOP = 942.2


def main() -> None:
    options = arguments(
        __doc__ or "",
        rounds={"type": int, "default": 3},
        frames={"type": int, "default": 64},
        stream={"type": int, "default": 3600},
        exact={"action": "store_true", "help": "keep the stream's KV cache in fp32 instead of bfloat16"},
    )
    show(measure(options.frames, options.rounds, options.stream, rounded=not options.exact), as_json=options.json)


def measure(frames: int, rounds: int, stream: int, *, rounded: bool = True) -> Iterator[Measurement]:
    """Measure the modes over `frames` frames, then a stream of `stream` frames; 0 skips either."""
    model = build_model(model_settings(), vocab_size=VOCABULARY).eval().requires_grad_(False)
    if frames:
        yield from modes(model, frames, rounds)
    if stream:
        yield from stream_growth(model, stream, rounded=rounded)


def modes(model: FoveatedVLM, frames: int, rounds: int) -> Iterator[Measurement]:
    """Measure the FLOPs of the fine mode, and the time of two modes relative to the bare encoder."""
    batch = video_question(frames)
    plain = Dinov2Model(model.encoder.config).eval()
    pixels = torch.randn(frames, 3, FRAME_PX, FRAME_PX)

    @torch.no_grad()
    def encode() -> None:
        plain(pixels)

    gflop = count_flops(lambda: read_batch(model, batch, "coarse_fine")) / 1e9
    yield Measurement("inference", "coarse_fine_gflop", gflop, "GFLOP", "the original implementation", gflop / ORIGINAL_GFLOP)
    seconds = side_by_side(
        {
            "encode": encode,
            "coarse_fine": lambda: read_batch(model, batch, "coarse_fine"),
            "autoregressive": lambda: read_batch(model, batch, "autoregressive"),
        },
        rounds=rounds,
    )
    for mode in ("coarse_fine", "autoregressive"):
        ratio = seconds[mode] / seconds["encode"]
        yield Measurement("inference", f"{mode}_vs_encode", ratio, "x", "Dinov2Model forward", ratio)


@torch.no_grad()
def stream_growth(model: FoveatedVLM, frames: int, early: int = 60, *, rounded: bool = True) -> list[Measurement]:
    """Compare resident memory and time per frame at the end of a stream with those at frame `early`."""
    stream = FrameStream(model, NO_TEMPLATE, task_ids=[1], context=frames + 512, rounded=rounded)
    stream.cache.grow(frames + 512)  # allocate and touch all of it now, so that cache growth does not look like a leak
    assert isinstance(stream.cache, LongCache)
    for layer in stream.cache.layers:
        for part in stream.cache.held(layer, stream.length, frames + 512):
            part.zero_()
    picture = np.random.default_rng(0).integers(0, 256, (FRAME_PX, FRAME_PX, 3), dtype=np.uint8)
    resident: list[float] = []
    for _ in range(frames):
        stream.push(picture)
        if stream.seen in (early, frames):
            gc.collect()
            resident.append(resident_gb())
    growth = (resident[1] - resident[0]) * 1000
    floor = stream.cache.bytes / stream.cache.starts[-1] * (frames - early) / 1e6
    late, first, reading = _per_frame(model, stream, picture, early)
    return [
        Measurement("inference", "stream_memory_growth_mb", growth, "MB", f"keys and values of {frames - early} tokens", growth / floor),
        Measurement("inference", "stream_frame_seconds", late, "s", f"time per frame at frame {early}", late / first),
        Measurement("inference", "stream_latency_growth", late / first, "x", f"time per frame at frame {early}", late / first),
        Measurement(
            "inference", "stream_latency_floor", 1 + reading / first, "x", "reading the keys and values added since", 1 + reading / first
        ),
    ]


def _per_frame(model: FoveatedVLM, late: FrameStream, picture: np.ndarray, early: int, frames: int = 30) -> tuple[float, float, float]:
    """Return median seconds, measured in turn: a long stream's next frames, a new stream's frames up to `early`, and reading the part of
    the long stream's cache that the new one does not have."""
    new = FrameStream(model, NO_TEMPLATE, task_ids=[1], rounded=late.rounded)
    for _ in range(early - frames):
        new.push(picture)

    def read() -> None:
        assert isinstance(late.cache, LongCache)
        for layer in late.cache.layers:
            for part in late.cache.held(layer, new.length, late.length):
                part.sum()

    steps = {"late": lambda: late.push(picture), "new": lambda: new.push(picture), "read": read}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(frames):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - started)
    late_s, new_s, read_s = (statistics.median(seconds) for seconds in taken.values())
    return late_s, new_s, read_s


if __name__ == "__main__":
    main()
