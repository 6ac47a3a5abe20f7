"""Everything that waits for a GPU, in one command of at most eight minutes: `python -m benchmarks.gpu_checks --output FOLDER`.

1. `tests/train/test_cuda.py`.
2. The micro-batch of `benchmarks.roofline` on the card, eager, compiled and autotuned: milliseconds, MFU, memory and kernels, and the time
   beside that of the model of the card.
3. Thousands of steps of the trainer itself on shards of videos, read by the loader's processes: recompilations after the warm-up, stalls,
   the share of the time waiting for data, and how often a step waits for the device.

The most important comes first; what the time no longer allows is left out, and the table says so. Every line is also written to
`checks.jsonl`. `--device cpu --tiny` runs the same code on a CPU with a model of a few thousand parameters. The batches that fill a card,
with the real loader at all three sizes, are `benchmarks.gpu_train_step`, which takes longer.
"""

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_train_step import GOAL_MFU, GOAL_WAIT, NO_GPU, speed_job, write_videos
from benchmarks.kernels import Kind
from benchmarks.report import arguments
from benchmarks.roofline import GROUPS, MICRO_BATCHES, videos
from benchmarks.shapes import FRAME_PX, SMOLLM2, VOCABULARY, model_settings
from benchmarks.train_step import LOSS
from fvlm_core.config import COMPILED_PARTS, ModelSettings, OptimizerSettings, Recipe
from fvlm_core.model.build import build_model
from fvlm_core.train.cost import Cost
from fvlm_core.train.distributed import World
from fvlm_core.train.folder import input_digests
from fvlm_core.train.loop import Trainer
from fvlm_core.train.metrics import PEAK_TFLOPS, peak_flops, peak_memory_gb, reset_peak_memory
from fvlm_core.train.optimizer import build_optimizer, clip_gradients, gradient_norms
from fvlm_core.train.start import compile_parts

BUDGET_S = 460.0
EXPECTED_S: dict[Kind, float] = {"eager": 15.0, "compiled": 75.0, "autotuned": 150.0}
"""With compilation; what has less time left is left out."""
STEPS = 5
"""Measured of a micro-batch's kind, after as many for warming up."""
LONG_STEPS, LONG_WARM_UP = 2000, 50
LONG_SAMPLES = 4
"""Of each of the many steps: small, so that 2,000 of them fit into the time; what makes a step compile again or wait is the same."""
WATCHED_STEPS = 5
"""In which waiting for the device is counted."""
GOAL_WAITS = 1
"""Of a step for the device: the one transfer of what is logged."""
STALL = 5.0
"""A step that takes this many times the median is a stall."""
TINY: dict[str, Any] = {
    "vision": {"shape": {"width": 16, "layers": 2, "heads": 2}, "frame_px": 28},
    "llm": {"shape": {"width": 24, "layers": 2, "heads": 2, "kv_heads": 1, "mlp_width": 48, "context": 1024}},
    "fine_iterations": 1,
}


@dataclass(frozen=True)
class Check:
    """One figure, or why there is none."""

    what: str
    value: float | None
    unit: str
    goal: str = ""
    met: bool | None = None
    """None where there is no goal."""


def main() -> None:
    options = arguments(
        __doc__ or "",
        output={"type": Path, "required": True, "help": "folder for checks.jsonl"},
        sizes={"nargs": "+", "choices": list(SMOLLM2), "default": ["135M", "1.7B"]},
        budget_s={"type": float, "default": BUDGET_S},
        long_steps={"type": int, "default": LONG_STEPS},
        device={"choices": ["cuda", "cpu"], "default": "cuda"},
        tiny={"action": "store_true", "help": "a model of a few thousand parameters instead of the sizes"},
    )
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here; `--device cpu --tiny` runs the same code on a CPU", file=sys.stderr)
        sys.exit(NO_GPU)
    sizes = {"tiny": ModelSettings.model_validate(TINY)} if options.tiny else {size: model_settings(size) for size in options.sizes}
    options.output.mkdir(parents=True, exist_ok=True)
    table = Table("check", "value", "unit", "goal", "met")
    with (options.output / "checks.jsonl").open("w") as lines:
        for check in checks(sizes, device, budget_s=options.budget_s, long_steps=options.long_steps):
            print(json.dumps(asdict(check)), file=lines, flush=True)
            met = "" if check.met is None else "yes" if check.met else "NO"
            table.add_row(check.what, "" if check.value is None else f"{check.value:,.4g}", check.unit, check.goal, met)
            print(f"{check.what}: {check.value} {check.unit}", file=sys.stderr, flush=True)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def checks(sizes: dict[str, ModelSettings], device: torch.device, *, budget_s: float, long_steps: int) -> Iterator[Check]:
    """All of them, the most important first, within `budget_s`."""
    ends = time.monotonic() + budget_s
    card = next((name for name in PEAK_TFLOPS if device.type == "cuda" and name in torch.cuda.get_device_name(device)), None)
    with ThreadPoolExecutor(1) as aside, tempfile.TemporaryDirectory() as folder:
        modelled = aside.submit(_modelled, list(sizes), card)
        if device.type == "cuda":
            yield _tests()
        kinds: list[Kind] = ["compiled", "eager", "autotuned"] if device.type == "cuda" else ["eager"]
        smallest = next(iter(sizes.values()))
        for kind in kinds:
            if kind == kinds[-1]:
                yield from _within(ends, "compiled", f"{long_steps} steps", lambda: long_run(smallest, device, Path(folder), long_steps))
            for size, settings in sizes.items():
                one = partial(micro_batch, size, settings, kind, device, modelled.result)
                yield from _within(ends, kind, size, one)


def micro_batch(
    size: str, settings: ModelSettings, kind: Kind, device: torch.device, modelled: Callable[[], dict[tuple[str, str], float]]
) -> Iterator[Check]:
    """A step of the roofline's micro-batches on the device."""
    name = f"{size} {kind}"
    groups, micro_batches = (GROUPS, MICRO_BATCHES) if device.type == "cuda" else (1, 1)
    batch = videos(groups, frame_px=settings.vision.frame_px)
    model, optimizer, flops = _model(settings, kind, device, batch)
    on_device = batch.to(device)

    def step() -> None:
        with model.casts.step(adds=True):
            for _ in range(micro_batches):
                with torch.autocast(device.type, torch.bfloat16):
                    objective = model(on_device, LOSS).objective
                (objective / (batch.n_labels * micro_batches)).backward()
        norm = torch.stack(list(gradient_norms(optimizer).values())).norm()
        clip_gradients(optimizer, 1.0, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(STEPS):
        step()
    _finish(device)
    reset_peak_memory(device)
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        step()
        _finish(device)
        seconds.append(time.perf_counter() - started)
    took = statistics.median(seconds)
    yield Check(f"{name} micro-batch", float(len(batch.frames)), "frames")
    yield Check(f"{name} step", took * 1e3, "ms")
    if peak := peak_flops(device):
        mfu, goal = flops * micro_batches / took / peak, GOAL_MFU.get(size)
        yield Check(f"{name} MFU", mfu, "of the peak", f">= {goal}" if goal else "", mfu >= goal if goal else None)
    yield Check(f"{name} peak memory", peak_memory_gb(device), "GB")
    with profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as seen:
        step()
        _finish(device)
    yield Check(f"{name} kernels", float(sum(e.count for e in seen.key_averages() if e.device_type.name == device.type.upper())), "a step")
    if expected := modelled().get((size, kind)):
        yield Check(f"{name} step over the roofline's", took * 1e3 / expected, "1 is the model's bound")


def long_run(settings: ModelSettings, device: torch.device, folder: Path, steps: int) -> Iterator[Check]:
    """The trainer for `steps` steps, compiled on a GPU: does it compile again, stall, wait for data or for the device?"""
    trainer = _trainer(settings, device, folder, steps)
    compiled = device.type == "cuda"
    for _ in range(LONG_WARM_UP):
        trainer.step()
    graphs = counters["stats"]["unique_graphs"]
    trainer.clock = type(trainer.clock)()
    seconds = []
    for _ in range(steps - LONG_WARM_UP - WATCHED_STEPS):
        started = time.perf_counter()
        trainer.step()
        seconds.append(time.perf_counter() - started)
    median, clock = statistics.median(seconds), trainer.clock
    again = counters["stats"]["unique_graphs"] - graphs
    stalls = sum(one > STALL * median for one in seconds)
    wait = clock.waited / clock.seconds
    if compiled:
        yield Check(f"{len(seconds)} steps recompilations", float(again), "graphs", "0", again == 0)
    yield Check(f"{len(seconds)} steps stalls", float(stalls), f"steps of over {STALL:g} medians", "0", stalls == 0)
    yield Check(f"{len(seconds)} steps slowest", max(seconds) / median, "medians")
    yield Check(f"{len(seconds)} steps speed", clock.samples / clock.seconds, "samples/s")
    yield Check(f"{len(seconds)} steps waiting for data", wait, "of the time", f"<= {GOAL_WAIT}", wait <= GOAL_WAIT)
    if device.type == "cuda":
        waits = host_waits(trainer.step, WATCHED_STEPS)
        yield Check("waits for the device", waits, "a step", f"<= {GOAL_WAITS}", waits <= GOAL_WAITS)
    trainer.spread.end()


def host_waits(step: Callable[[], object], steps: int) -> float:
    """How often a step makes the host wait for a CUDA device, as torch counts it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(steps):
                step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in seen) / steps


def _model(settings: ModelSettings, kind: Kind, device: torch.device, batch: Any) -> tuple[Any, torch.optim.AdamW, float]:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    torch.compiler.reset()
    model = build_model(settings, vocab_size=VOCABULARY).to(device).train()
    compile_parts(model, () if kind == "eager" else COMPILED_PARTS, autotune=kind == "autotuned")
    return model, build_optimizer(model, OptimizerSettings()), Cost(model, LOSS).batch(batch)


def _trainer(settings: ModelSettings, device: torch.device, folder: Path, steps: int) -> Trainer:
    px, workers = settings.vision.frame_px, 6 if device.type == "cuda" else 0
    shards = write_videos(folder / "shards", frame_px=px, videos=64 if px == FRAME_PX else 4, vocabulary=VOCABULARY)
    job = speed_job(folder / "long", shards, settings, steps=steps, workers=workers, device=device.type)
    changes = {"run.steps": steps + 16, "run.batch_samples": LONG_SAMPLES, "run.compile": device.type == "cuda"}
    recipe: Recipe = job.recipe.with_changes(changes)
    world = World.join({}, device.type)
    trainer = Trainer(recipe, world, "checks", input_digests(recipe), has_wandb_key=False)
    trainer.go_to(None, trainer.state)
    return trainer


def _within(ends: float, kind: Kind, what: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The check, or that there was no time or memory for it."""
    if time.monotonic() + EXPECTED_S[kind] > ends:
        yield Check(f"{what} {kind}", None, "left out: no time")
        return
    try:
        yield from check()
    except torch.OutOfMemoryError:
        yield Check(f"{what} {kind}", None, "out of memory")


def _modelled(sizes: list[str], card: str | None) -> dict[tuple[str, str], float]:
    """The roofline's milliseconds of a step by size and kind, computed by a process beside the GPU's work."""
    if card not in ("A100", "H100", "H200"):
        return {}
    command = [sys.executable, "-m", "benchmarks.roofline", "--json", "--cards", card, "--threads", "2", "--sizes", *sizes]
    rows = [json.loads(line) for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()]
    return {(row["size"], row["kind"]): row["ms"] for row in rows if row["part"] == "step"}


def _tests() -> Check:
    command = [sys.executable, "-m", "pytest", "tests/train/test_cuda.py", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-3000:], file=sys.stderr)
    return Check("tests/train/test_cuda.py", float(done.returncode), "exit status", "0", done.returncode == 0)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
