"""Gaze before encode (`model.glance`) at DINOv2-small + SmolLM2-135M with random weights: savings, and the cost of larger frames.

The base case is 64 frames and a question of 32 tokens, with a glance of 112 px and 16 opened patches per query, against encoding every 224
px frame in full. For larger frames about as many patches are encoded (glance plus opened), spread over more levels. Downscaling to the
glance is timed separately, because a JPEG decoder does it as part of decoding.

`--parts` selects the measurements. `--world 6 9 12` trains the learning experiment of `foveation_world`, which takes more than an hour on
one core. Results that are already in `--out` are shown and not computed again.
"""

import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from benchmarks import foveation_world
from benchmarks.report import Measurement, arguments, show, side_by_side
from benchmarks.shapes import NO_TEMPLATE, VOCABULARY, model_settings, video_question
from benchmarks.smolvlm2 import first_token
from fvlm_core.config import GlanceSettings, VisionSettings, VisionShape
from fvlm_core.data.batch import PackedBatch
from fvlm_core.data.frames import encode_jpeg
from fvlm_core.data.tiles import TiledFrame, TiledFrames, tiled
from fvlm_core.model.build import build_model
from fvlm_core.model.flop_counter import count_flops
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.glance import downscale, encode_downscaled
from fvlm_core.model.inference import Context, read_batch
from fvlm_core.serve.stream import FrameStream

FULL_GFLOP = 768.7
"""GFLOP of 64 frames and a question with every frame encoded in full, as counted by `benchmarks.inference`."""
GLANCES: dict[int, dict[str, Any]] = {
    224: {"px": 112, "zoom": 2, "levels": 1, "open": 4},
    448: {"px": 112, "zoom": 2, "levels": 2, "open": 2},
    896: {"px": 112, "zoom": 2, "levels": 3, "open": 1},
    3528: {"px": 98, "zoom": [4, 3, 3], "levels": 3, "open": 1},
    3584: {"px": 112, "zoom": 2, "levels": 5, "open": 1},
    4032: {"px": 84, "zoom": [4, 4, 3], "levels": 3, "open": 1},
}
"""Glance settings by frame size. Encoded patches (glance plus opened): 80, 80, 76, 83, 84 and 77. The long side of 4K is 3840 px."""
FOUR_K, TILE = 4032, 224
MANY, FEW = 16, 4
"""Frames per clip. Each level is one more pass through the encoder's weights, and the frames of a clip share that pass."""
LARGER = [frame_px for frame_px in GLANCES if frame_px != TILE]
PARTS = ("costs", "larger", "stream", "decoding", "rival")
RIVAL = "SmolVLM2-256M"


def main() -> None:
    options = arguments(
        __doc__ or "",
        rounds={"type": int, "default": 3},
        frames={"type": int, "default": 64},
        parts={"nargs": "*", "choices": PARTS, "default": list(PARTS)},
        rival_frames={"type": int, "default": 64},
        world={"type": int, "nargs": "*", "default": [], "help": "grid sizes of the learning experiment"},
        seeds={"type": int, "default": 1},
        out={"type": Path, "default": Path("foveation-world"), "help": "folder for weights and results of the learning experiment"},
    )
    show(measure(options), as_json=options.json)


def measure(options: Namespace) -> Iterator[Measurement]:
    """Run the selected parts and the learning experiment."""
    if "costs" in options.parts:
        yield from costs(options.frames, options.rounds)
    for frame_px in LARGER if "larger" in options.parts else ():
        yield from larger(frame_px, options.rounds, frames=MANY)
    if "larger" in options.parts:
        yield from larger(FOUR_K, options.rounds, frames=FEW)
        yield against_tiles()
    if "stream" in options.parts:
        yield stream_rate(min(options.frames, 32))
    if "decoding" in options.parts:
        yield from decoding(options.rounds)
        yield from tiles(options.rounds)
    if "rival" in options.parts:
        yield first_tokens(options.rival_frames)
    yield from acuity(options.world, options.seeds, options.out)


def glance_model(frame_px: int = TILE) -> FoveatedVLM:
    """Build the model for frames of `frame_px`."""
    glance = GlanceSettings(**GLANCES[frame_px])
    vision = VisionSettings(shape=VisionShape(), frame_px=frame_px)
    return build_model(model_settings(vision=vision, glance=glance), vocab_size=VOCABULARY).eval().requires_grad_(False)


def costs(frames: int, rounds: int) -> Iterator[Measurement]:
    """Compare FLOPs and seconds with encoding every frame in full."""
    full = build_model(model_settings(), vocab_size=VOCABULARY).eval().requires_grad_(False)
    ours, batch = glance_model(), video_question(frames)
    runs = {name: (lambda model=model: read_batch(model, batch, "coarse_fine")) for name, model in (("full", full), ("ours", ours))}
    gflop = {name: count_flops(run) / 1e9 for name, run in runs.items()}
    against = f"every frame in full, {frames} frames: {gflop['full']:.1f} GFLOP"
    yield Measurement("foveation", "flops_vs_full", gflop["ours"], "GFLOP", against, gflop["ours"] / gflop["full"])
    seconds = side_by_side(runs, rounds=rounds)
    against = f"every frame in full: {seconds['full']:.2f} s"
    yield Measurement("foveation", "seconds_vs_full", seconds["ours"], "s", against, seconds["ours"] / seconds["full"])


def first_tokens(frames: int) -> Measurement:
    """Compare the time to the first token with SmolVLM2's."""
    model, batch = glance_model(), video_question(frames)
    pair = {
        "ours": lambda: model.llm.lm_head(read_batch(model, batch, "coarse_fine", room=1).hidden[-1:]).argmax(-1),
        RIVAL: first_token(RIVAL, frames),
    }
    taken = side_by_side(pair, rounds=1)
    against = f"{RIVAL}, {frames} frames: {taken[RIVAL]:.2f} s"
    return Measurement("foveation", "ttft_vs_smolvlm2", taken["ours"], "s", against, taken["ours"] / taken[RIVAL])


def larger(frame_px: int, rounds: int, *, frames: int) -> Iterator[Measurement]:
    """Compare frames of `frame_px` with the same number of 224 px frames."""
    model, batch = glance_model(frame_px), video_question(frames, frame_px=frame_px)
    small, usual = glance_model(), video_question(frames)
    glance = model.settings.glance
    assert glance is not None
    gflop = [count_flops(lambda m=m, b=b: read_batch(m, b, "coarse_fine")) / 1e9 for m, b in ((model, batch), (small, usual))]
    name = ("4k" if frame_px == FOUR_K else str(frame_px)) + ("" if frames == MANY else f"_{frames}_frames")
    yield Measurement(
        "foveation", f"cost_{name}_vs_224", gflop[0], "GFLOP", f"224 px, {frames} frames: {gflop[1]:.1f} GFLOP", gflop[0] / gflop[1]
    )
    seconds = side_by_side({"large": besides_downscaling(model, batch), "small": besides_downscaling(small, usual)}, rounds=rounds)
    # by itself, so that the two are timed one directly after the other
    downscaling = side_by_side({"": lambda: downscale(batch.frames, glance.shrink)}, rounds=min(rounds, 5))[""]
    against = f"besides downscaling, {downscaling / frames * 1000:.1f} ms a frame; 224 px: {seconds['small']:.2f} s"
    yield Measurement("foveation", f"seconds_{name}_vs_224", seconds["large"], "s", against, seconds["large"] / seconds["small"])


def besides_downscaling(model: FoveatedVLM, batch: PackedBatch) -> Callable[[], Context]:
    """Return a run of `read_batch` on frames that are already downscaled to the glance, as a JPEG decoder provides them."""
    assert model.settings.glance is not None
    small = downscale(batch.frames, model.settings.glance.shrink)

    def run() -> Context:
        return read_batch(model, batch, "coarse_fine", features=encode_downscaled(model.encoder, small, batch.frames))

    return torch.no_grad()(run)


def against_tiles() -> Measurement:
    """Compare the FLOPs of a 4K frame with encoding it as 224 px tiles."""
    full = build_model(model_settings(), vocab_size=VOCABULARY).eval().requires_grad_(False)
    model, batch = glance_model(FOUR_K), video_question(FEW, frame_px=FOUR_K)
    tile = count_flops(lambda: full.encode(video_question(1).frames)) / 1e9
    ours = count_flops(lambda: read_batch(model, batch, "coarse_fine")) / 1e9 / FEW
    tiles = (FOUR_K // TILE) ** 2
    return Measurement("foveation", "flops_4k_vs_tiles", ours, "GFLOP", f"{tiles} tiles of 224 px, encoded only", ours / (tile * tiles))


@torch.no_grad()
def stream_rate(frames: int) -> Measurement:
    """Frames per second of a stream with a known question: each frame is glanced at, opened and read before the next one arrives."""
    stream = FrameStream(glance_model(), NO_TEMPLATE, task_ids=[1])
    picture = np.random.default_rng(0).integers(0, 256, (TILE, TILE, 3), dtype=np.uint8)
    taken = []
    for _ in range(frames):
        started = time.perf_counter()
        stream.push(picture)
        taken.append(time.perf_counter() - started)
    rate = 1 / statistics.median(taken)
    return Measurement("foveation", "autoregressive_fps", rate, "frames/s", "10 frames a second", rate / 10)


def decoding(rounds: int) -> Iterator[Measurement]:
    """Compare decoding JPEGs at the glance's size (the decoder scales by eighths) with decoding them in full."""
    rng, small_px = np.random.default_rng(0), GLANCES[TILE]["px"]
    for frame_px in (224, 448, 896):
        rough = Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8))
        jpeg = simplejpeg.encode_jpeg(np.asarray(rough.resize((frame_px, frame_px), Image.Resampling.BICUBIC)), quality=90)

        def full(jpeg: bytes = jpeg) -> None:
            for _ in range(20):
                simplejpeg.decode_jpeg(jpeg)

        def small(jpeg: bytes = jpeg) -> None:
            for _ in range(20):
                simplejpeg.decode_jpeg(jpeg, min_height=small_px, min_width=small_px)

        seconds = side_by_side({"full": full, "small": small}, rounds=rounds)
        in_full = f"in full: {seconds['full'] * 50:.2f} ms"
        ratio = seconds["small"] / seconds["full"]
        yield Measurement("foveation", f"decode_glance_{frame_px}", seconds["small"] * 50, "ms", in_full, ratio)


def tiles(rounds: int) -> Iterator[Measurement]:
    """Compare frames stored as tiles with one JPEG per frame: decoding time of the small frame and the opened tiles, and bytes."""
    rng = np.random.default_rng(0)
    for frame_px in (448, 896, FOUR_K):
        glance = GlanceSettings(**GLANCES[frame_px])
        grid = glance.px // 14
        jpeg = encode_jpeg(textured(frame_px, rng))
        stored, out = tiled(jpeg, frame_px // grid, glance.px), np.empty((frame_px, frame_px, 3), np.uint8)
        opened = torch.from_numpy(rng.choice(grid**2, glance.open, replace=False))[None]

        def some(stored: bytes = stored, glance: GlanceSettings = glance, opened: Tensor = opened, grid: int = grid) -> None:
            frame = TiledFrame.parse(stored)
            assert frame is not None
            simplejpeg.decode_jpeg(frame.small)
            TiledFrames([frame], "").squares(torch.zeros(1, dtype=torch.int64), opened // grid, opened % grid, frame.side // grid)

        def every(stored: bytes = stored, out: np.ndarray = out) -> None:
            frame = TiledFrame.parse(stored)
            assert frame is not None
            frame.decode(out)

        taken = side_by_side({"full": lambda jpeg=jpeg: simplejpeg.decode_jpeg(jpeg), "some": some, "every": every}, rounds=5 * rounds)
        ms = {name: seconds * 1000 for name, seconds in taken.items()}
        in_full = f"one JPEG in full: {ms['full']:.2f} ms"
        yield Measurement("foveation", f"decode_opened_tiles_{frame_px}", ms["some"], "ms", in_full, ms["some"] / ms["full"])
        yield Measurement("foveation", f"decode_all_tiles_{frame_px}", ms["every"], "ms", in_full, ms["every"] / ms["full"])
        size = f"one JPEG: {len(jpeg) / 1000:.0f} kB"
        yield Measurement("foveation", f"bytes_of_tiles_{frame_px}", len(stored) / 1000, "kB", size, len(stored) / len(jpeg))


def textured(side: int, rng: np.random.Generator) -> np.ndarray:
    """Draw an image uint8 [side, side, 3] with detail at all scales, like a photograph: amplitude in proportion to size."""
    total, cells = np.full((side, side, 3), 127.5, np.float32), 4
    while cells <= side:
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        total += (np.asarray(noise, np.float32) - 127.5) * (2 / cells)
        cells *= 2
    return total.clip(0, 255).astype(np.uint8)


def acuity(grids: Sequence[int], seeds: int, out: Path) -> Iterator[Measurement]:
    """Run the learning experiment for each seed. Each grid starts from the weights of the previous grid."""
    for seed in range(seeds):
        before: Path | None = None
        for grid in grids:
            result = out / f"world_{grid}_{seed}.json"
            if not result.exists():
                run = foveation_world.Run(grid, seed, say=lambda _: None)
                foveation_world.experiment(run, out, start=before)
            before = out / f"chosen_{grid}_{seed}.pt"
            yield from compared(json.loads(result.read_text()))


def compared(result: dict) -> Iterator[Measurement]:
    """Yield the measurements of one grid and seed."""
    k2, where = result["k2"], f"{result['grid']} x {result['grid']} cells, seed {result['seed']}"
    for name, other in (("dense", "dense_as_long"), ("random", "random2"), ("glance", "glance_only"), ("oracle", "oracle2")):
        value = result[other]["accuracy"]
        yield Measurement("foveation", f"acuity_k2_vs_{name}", k2["accuracy"], "", f"{where}: {value:.3f}", k2["accuracy"] - value)
    yield Measurement("foveation", "open_hit_rate", k2["hit"], "", where)
    value = result["k2_autoregressive"]["accuracy"]
    yield Measurement("foveation", "acuity_autoregressive_vs_fine", value, "", where, value - k2["accuracy"])


if __name__ == "__main__":
    main()
