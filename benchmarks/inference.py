"""Inference at DINOv2-small + SmolLM2-135M: 64 frames and a question of 32 tokens, in two modes, against the bare encoder;
and a stream of an hour (3,600 frames at 1 FPS).

Floor: a plain `Dinov2Model` forward over the same frames, which any model that looks at them all has to pay; for the stream,
the keys and values of one token a frame.
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
from fvlm_core.serve.stream import FrameStream

ORIGINAL_GFLOP = 942.2


def main() -> None:
    options = arguments(
        __doc__ or "", rounds={"type": int, "default": 3}, frames={"type": int, "default": 64}, stream={"type": int, "default": 3600}
    )
    show(measure(options.frames, options.rounds, options.stream), as_json=options.json)


def measure(frames: int, rounds: int, stream: int) -> Iterator[Measurement]:
    """The modes over `frames` frames, then a stream of `stream` frames, unless that is 0."""
    model = build_model(model_settings(), vocab_size=VOCABULARY).eval().requires_grad_(False)
    batch = video_question(frames)
    plain = Dinov2Model(model.encoder.config).eval()
    pixels = torch.randn(frames, 3, 224, 224)

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
    if stream:
        yield from stream_growth(model, stream)


@torch.no_grad()
def stream_growth(model: FoveatedVLM, frames: int, early: int = 60) -> list[Measurement]:
    """Resident memory and time per frame of a stream's last frames against its 60th, and the keys and values in between."""
    stream = FrameStream(model, NO_TEMPLATE, task_ids=[1], context=frames + 512)
    stream.cache.grow(frames + 512)  # all of it at once, so that growing is not mistaken for a leak
    picture = np.random.default_rng(0).integers(0, 256, (FRAME_PX, FRAME_PX, 3), dtype=np.uint8)
    resident: list[float] = []
    for _ in range(frames):
        stream.push(picture)
        if stream.seen in (early, frames):
            gc.collect()
            resident.append(resident_gb())
    growth = (resident[1] - resident[0]) * 1000
    floor = stream.cache.bytes / stream.cache.starts[-1] * (frames - early) / 1e6
    late, first = _per_frame(model, stream, picture, early)
    return [
        Measurement("inference", "stream_memory_growth_mb", growth, "MB", f"keys and values of {frames - early} tokens", growth / floor),
        Measurement("inference", "stream_latency_growth", late / first, "x", f"time per frame at frame {early}", late / first),
    ]


def _per_frame(model: FoveatedVLM, late: FrameStream, picture: np.ndarray, early: int, frames: int = 30) -> tuple[float, float]:
    """Median seconds of a long stream's next frames and of a new one's up to its frame `early`, taken in turn."""
    new = FrameStream(model, NO_TEMPLATE, task_ids=[1])
    for _ in range(early - frames):
        new.push(picture)
    taken: dict[FrameStream, list[float]] = {late: [], new: []}
    for _ in range(frames):
        for stream, seconds in taken.items():
            started = time.perf_counter()
            stream.push(picture)
            seconds.append(time.perf_counter() - started)
    return statistics.median(taken[late]), statistics.median(taken[new])


if __name__ == "__main__":
    main()
