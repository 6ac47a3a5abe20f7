"""The loader on one core, compared with webdataset + Pillow and with bare JPEG decoding; balance of its micro-batches; what a GPU needs.

`python -m benchmarks.loader`. All three read the same shards of videos, images and texts (224 px, about 9 KB per frame) from the page
cache, in turn, in one process and one thread. Results are frames per CPU-second, so that a busy machine affects all alike. Ours does what a
loader process does: plan, read, decode, pack. webdataset's own pipeline decodes with Pillow and stacks the frames. The limit decodes JPEG
bytes from memory into a reused buffer.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from webdataset import WebDataset

from benchmarks.mixed_shards import mixed_data, write_mixed
from benchmarks.report import Measurement, arguments, peak_memory_gb, show
from benchmarks.shapes import DINOV2_SMALL, SMOLLM2, VOCABULARY, model_settings
from fvlm_core.config import LossSettings, RunSettings
from fvlm_core.data.loader import train_steps
from fvlm_core.data.plan import Plan
from fvlm_core.data.plan_tables import load
from fvlm_core.data.reader import Reader
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.model.flops import ModelDims, SampleShape, sample_flops

ROUNDS = 5
RUN = RunSettings(steps=1_000, batch_samples=256)
RANKS = 2
PLANNED_STEPS = 100
A100_FLOPS, MFU, PROCESSES = 312e12, 0.5, 6
"""Peak FLOP/s in bf16 without sparsity, from the data sheet; target MFU; loader processes per GPU."""


def main() -> None:
    """Measure and print the results."""
    options = {
        "clips": {"type": int, "default": 60, "help": "number of videos, of images and of texts"},
        "frames": {"type": int, "default": 1_500, "help": "frames to read per round"},
        "workers": {"type": int, "default": 2, "help": "loader processes of the last measurement"},
    }
    asked = arguments(__doc__ or "", **options)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shards = ShardSet(write_mixed(Path(folder) / "shards", clips=asked.clips))
        show(measure(shards, frames=asked.frames, workers=asked.workers), as_json=asked.json)


def measure(shards: ShardSet, *, frames: int, workers: int, rounds: int = ROUNDS) -> Iterator[Measurement]:
    """Run all measurements."""
    plan = Plan(shards, mixed_data(), RUN, tokens_per_frame=1, world_size=RANKS)
    rates, memory = side_by_side(shards, plan, frames, rounds)
    ours, limit, theirs = rates["ours"], rates["limit"], rates["webdataset"]
    yield Measurement("loader", "frames_per_core", ours, "frames per CPU-second")
    yield Measurement("loader", "vs_webdataset", ours, "frames per CPU-second", f"webdataset and Pillow, {theirs:.0f}", ours / theirs)
    yield Measurement("loader", "vs_decode_limit", ours, "frames per CPU-second", f"bare simplejpeg, {limit:.0f}", ours / limit)
    for name, peak_gb in memory.items():
        yield Measurement("loader", f"peak_memory_{name}", peak_gb, "GB")
    yield from of_the_plan(plan)
    needed = frames_needed(plan)
    about = f"135M at MFU {MFU:.0%} of an A100, {PROCESSES} processes"
    yield Measurement("loader", "frames_needed", needed, "frames/s", about, PROCESSES * ours / needed)
    yield Measurement("loader", f"with_{workers}_processes", with_processes(shards, workers, frames), "frames/s")


def side_by_side(shards: ShardSet, plan: Plan, frames: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return frames per CPU-second (medians) and peak memory in GB above the initial memory."""
    reader = Reader(plan.mixed, tokens_per_frame=1)
    batches = list(islice((slots for step in range(RUN.steps or 0) for slots in plan.micro_batches(step)[0]), 64))
    held = np.cumsum([plan.mixed.costs(slots)[:, 0].sum() for slots in batches])
    batches = batches[: int(np.searchsorted(held, frames)) + 1]
    side = shards.manifest.frame_px
    memory = np.zeros((RUN.micro_batch.frames, side, side, 3), np.uint8)
    jpegs = [jpeg for slots in batches for jpeg in _jpegs(shards, [plan.mixed.row(slot) for slot in slots])]
    urls = [str(shards.folder / name) for name in shards.shard_names]

    def ours() -> int:
        read = [reader.pack(slots, memory) for slots in batches]
        return sum(one.in_buffer or 0 for one in read)

    def limit() -> int:
        for number, jpeg in enumerate(jpegs):
            simplejpeg.decode_jpeg(jpeg, "RGB", buffer=memory[number % len(memory)])
        return len(jpegs)

    def theirs() -> int:
        samples = WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8")
        done, batch = 0, []
        for sample in samples:
            batch.extend(value for name, value in sample.items() if name.endswith("jpg"))
            if len(batch) >= RUN.micro_batch.frames or done + len(batch) >= len(jpegs):
                done += len(torch.from_numpy(np.stack(batch)))
                batch = []
            if done >= len(jpegs):
                break
        return done

    functions: dict[str, Callable[[], int]] = {"ours": ours, "limit": limit, "webdataset": theirs}
    peaks = {name: peak_memory_gb(function) for name, function in functions.items() if name != "limit"}
    rates: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.process_time()
            done = function()
            rates[name].append(done / (time.process_time() - started))
    return {name: statistics.median(taken) for name, taken in rates.items()}, peaks


def of_the_plan(plan: Plan) -> Iterator[Measurement]:
    """Measure padding and balance of the mixture's micro-batches over all ranks."""
    found, budget = load(plan, range(PLANNED_STEPS)), plan.run.micro_batch
    reader = Reader(plan.mixed, tokens_per_frame=1)
    batch = reader.pack(plan.micro_batches(0)[0][0]).batch
    assert batch is not None
    positions, lengths = len(batch.input_ids), sum(batch.lengths)
    yield Measurement("loader", "padded_token_share", 1 - lengths / positions, "of positions")
    about = f"{RANKS} ranks, {PLANNED_STEPS} steps of {RUN.batch_samples} samples"
    yield Measurement("loader", "rank_cost_spread", float(found.spread.max()), "largest, of budgets", about)
    flops = _flops(plan)
    by_rank = np.array([[sum(flops[slot_rows(plan, rank)]) for rank in plan.micro_batches(step)] for step in range(PLANNED_STEPS)])
    spread = by_rank.max(1) / by_rank.min(1) - 1
    yield Measurement("loader", "rank_flops_spread", float(spread.max()), "largest, of training FLOPs at 135M", about)
    yield Measurement("loader", "rank_flops_spread_mean", float(spread.mean()), "mean", about)
    yield Measurement(
        "loader", "largest_micro_batch_frames", float(found.frames.max()), "frames", "the budget", found.frames.max() / budget.frames
    )
    yield Measurement(
        "loader", "largest_micro_batch_tokens", float(found.tokens.max()), "tokens", "the budget", found.tokens.max() / budget.tokens
    )


def slot_rows(plan: Plan, micro_batches: list) -> list[int]:
    """Return the rows of a rank's samples."""
    return [plan.mixed.row(slot) for slots in micro_batches for slot in slots]


def frames_needed(plan: Plan) -> float:
    """Return the frames per second that one GPU consumes at the target MFU, for this mixture and the smallest model."""
    flops, rows = _flops(plan), [plan.mixed.row(slot) for step in range(4) for slot in plan.samples(step)]
    return A100_FLOPS * MFU / (flops[rows].sum() / plan.mixed.shards.n_frames[rows].sum())


def _flops(plan: Plan) -> np.ndarray:
    """Return the training FLOPs of every row, at DINOv2-small + SmolLM2-135M with the default losses."""
    shards, data, settings = plan.mixed.shards, plan.mixed.data, model_settings(fine_iterations=2)
    vision = {"hidden_size": DINOV2_SMALL.width, "num_hidden_layers": DINOV2_SMALL.layers, "patch_size": 14, "mlp_ratio": 4}
    shape = SMOLLM2["135M"]
    llm = {
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.layers,
        "vocab_size": VOCABULARY,
    }
    dims = ModelDims.from_configs(vision, llm, shards.manifest.frame_px)
    losses = {"coarse": 1.0, "fine": [1.0, 1.0]}
    table = shards.rows("train")
    found = np.zeros(len(shards.n_frames))
    for row, kind, frames, tokens, answers in zip(
        table.index, table["kind"], table["n_frames"], table["n_tokens"], table["n_answer_tokens"], strict=True
    ):
        shown = frames * (data.image_repeats if kind == "image" else 1)
        sizes = SampleShape(frames, shown, tokens, answers, shown + tokens - answers if shown else 0)
        found[row] = sample_flops(settings, dims, sizes, LossSettings.model_validate(losses)).train
    return found


def with_processes(shards: ShardSet, workers: int, frames: int) -> float:
    """Return frames per second of wall time from the real loader with `workers` processes, after its first step."""
    steps = train_steps(shards, mixed_data(workers=workers), RUN, tokens_per_frame=1, rank=0, world_size=RANKS)
    next(steps)
    started, done = time.perf_counter(), 0
    while done < frames:
        done += sum(len(batch.frames) for batch in next(steps))
    return done / (time.perf_counter() - started)


def _jpegs(shards: ShardSet, rows: list[int]) -> list[bytes]:
    """Return the JPEG files of rows."""
    contents = shards.fetch(rows)
    found = []
    for row in dict.fromkeys(rows):
        entry = shards._table.slice(row, 1).to_pylist()[0]
        first = entry["frame_offsets"][0] if entry["frame_offsets"] else 0
        content = contents[row]
        found.extend(
            bytes(content[offset - first : offset - first + size])
            for offset, size in zip(entry["frame_offsets"], entry["frame_sizes"], strict=True)
        )
    return found


if __name__ == "__main__":
    main()
