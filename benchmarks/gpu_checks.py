"""All checks that need a GPU, in one command of at most eight minutes: `python -m benchmarks.gpu_checks --output FOLDER`.

1. `tests/train/test_cuda.py`.
2. The step of `benchmarks.roofline`, eager, compiled and autotuned, in four, two and one micro-batches: milliseconds, MFU, memory, kernels,
   and the time relative to the roofline's prediction. Larger micro-batches mean fewer kernel launches for the host.
3. Attention within the frames by each of torch's kernels, at the lengths of 256, 257 and 258 tokens.
4. Thousands of steps of the trainer itself on video shards read by loader processes: recompilations after the warm-up, stalls, the share of
   time waiting for data, and how often a step waits for the device.

The most important checks run first. Checks that no longer fit into the time budget are left out, and the table says so. Every result is
also written to `checks.jsonl`, and the kernels of a step, with their counts and times, to `kernels.jsonl`. `--device cpu --tiny` runs the
same code on a CPU with a model of a few thousand parameters. `benchmarks.gpu_train_step` takes longer: it measures the largest batches that
fit, with the real loader, at all three sizes.
"""

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_train_step import GOAL_MFU, GOAL_WAIT, NO_GPU, speed_job, write_videos
from benchmarks.kernels import Kind
from benchmarks.report import arguments
from benchmarks.roofline import FRAMES, GROUPS, MICRO_BATCHES, videos
from benchmarks.shapes import FRAME_PX, SMOLLM2, VOCABULARY, model_settings
from benchmarks.train_step import LOSS
from fvlm_core.config import COMPILED_PARTS, ModelSettings, OptimizerSettings, Recipe
from fvlm_core.data.batch import PackedBatch
from fvlm_core.model.build import build_model
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.train.cost import Cost
from fvlm_core.train.distributed import World
from fvlm_core.train.folder import input_digests
from fvlm_core.train.loop import Trainer
from fvlm_core.train.metrics import PEAK_TFLOPS, peak_flops, peak_memory_gb, reset_peak_memory
from fvlm_core.train.optimizer import build_optimizer, clip_gradients, gradient_norms
from fvlm_core.train.start import compile_parts

BUDGET_S = 460.0
EXPECTED_S: dict[Kind, float] = {"eager": 40.0, "compiled": 160.0, "autotuned": 240.0}
"""Expected seconds including compilation, which took two minutes on a machine with an H200. A check with less time left is skipped."""
STEPS = 5
"""Measured steps, after as many warm-up steps."""
LONG_STEPS, LONG_WARM_UP = 2000, 50
LONG_SAMPLES = 4
"""Samples per step of the long run: few, so that 2,000 steps fit into the time. The causes of recompilation and waiting are the same."""
WATCHED_STEPS = 5
"""Steps in which waits for the device are counted."""
GOAL_WAITS = 1
"""Waits for the device per step: the one transfer of logged values."""
STALL = 5.0
"""A step that takes more than this many times the median is a stall."""
TINY: dict[str, Any] = {
    "vision": {"shape": {"width": 16, "layers": 2, "heads": 2}, "frame_px": 28},
    "llm": {"shape": {"width": 24, "layers": 2, "heads": 2, "kv_heads": 1, "mlp_width": 48, "context": 1024}},
    "fine_iterations": 1,
}


@dataclass(frozen=True)
class Check:
    """One result, or the reason why there is none."""

    what: str
    value: float | None
    unit: str
    goal: str = ""
    met: bool | None = None
    """None if there is no goal."""


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
    kernels = options.output / "kernels.jsonl"
    kernels.unlink(missing_ok=True)
    table = Table("check", "value", "unit", "goal", "met")
    with (options.output / "checks.jsonl").open("w") as lines:
        found = checks(sizes, device, kernels, budget_s=options.budget_s, long_steps=options.long_steps)
        for check in found:
            print(json.dumps(asdict(check)), file=lines, flush=True)
            met = "" if check.met is None else "yes" if check.met else "NO"
            table.add_row(check.what, "" if check.value is None else f"{check.value:,.4g}", check.unit, check.goal, met)
            print(f"{check.what}: {check.value} {check.unit}", file=sys.stderr, flush=True)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def checks(sizes: dict[str, ModelSettings], device: torch.device, kernels: Path, *, budget_s: float, long_steps: int) -> Iterator[Check]:
    """Run all checks within `budget_s`, the most important first. Writes the kernels of steps to the file `kernels`."""
    ends = time.monotonic() + budget_s
    card = next((name for name in PEAK_TFLOPS if device.type == "cuda" and name in torch.cuda.get_device_name(device)), None)
    with ThreadPoolExecutor(1) as aside, tempfile.TemporaryDirectory() as folder:
        modelled = aside.submit(_modelled, list(sizes), card)
        if device.type == "cuda":
            yield _tests()
        kinds: list[Kind] = ["compiled", "eager", "autotuned"] if device.type == "cuda" else ["eager"]
        smallest = next(iter(sizes.values()))
        yield from _within(ends, "eager", "attention", lambda: attention_kernels(smallest, device))
        for kind in kinds:
            if kind == kinds[-1]:
                yield from _within(ends, "compiled", f"{long_steps} steps", lambda: long_run(smallest, device, Path(folder), long_steps))
            for size, settings in sizes.items():
                one = partial(steps_of, size, settings, kind, device, modelled.result, kernels)
                yield from _within(ends, kind, size, one)


def attention_kernels(settings: ModelSettings, device: torch.device) -> Iterator[Check]:
    """Time attention (forward and backward) within the frames of a step, for each kernel that supports it.

    The lengths are the patches alone, with the CLS token, and with CLS token and query: 256 patches fill two tiles of 128, and 258 tokens
    begin a third.
    """
    shape = settings.vision.shape
    assert shape is not None
    frames = GROUPS * MICRO_BATCHES * sum(FRAMES) if device.type == "cuda" else 2
    patches = (settings.vision.frame_px // shape.patch_px) ** 2
    for tokens in (patches, patches + 1, patches + 2):
        size = (frames, shape.heads, tokens, shape.width // shape.heads)
        query, key, value, gradient = (torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(4))
        both = partial(_attend, query, key, value, gradient)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            try:
                with sdpa_kernel(backend):
                    took = _median_s(both, device)
            except RuntimeError as error:  # torch has no kernel of that kind for these
                yield Check(f"attention of {tokens} tokens, {backend.name}", None, str(error).splitlines()[0])
            else:
                yield Check(f"attention of {tokens} tokens, {backend.name}", took * 1e3, "ms")


def _attend(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> None:
    torch.autograd.grad(F.scaled_dot_product_attention(query, key, value), (query, key, value), gradient)


def _median_s(run: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of `STEPS` runs, after as many warm-up runs. Peak memory is reset after the warm-up."""
    for _ in range(STEPS):
        run()
    _finish(device)
    reset_peak_memory(device)
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        run()
        _finish(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def steps_of(
    size: str,
    settings: ModelSettings,
    kind: Kind,
    device: torch.device,
    modelled: Callable[[], dict[tuple[str, str], float]],
    kernels: Path,
) -> Iterator[Check]:
    """Measure the roofline's step on the device, in increasingly large micro-batches until one does not fit."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    torch.compiler.reset()
    model = build_model(settings, vocab_size=VOCABULARY).to(device).train()
    compile_parts(model, () if kind == "eager" else COMPILED_PARTS, autotune=kind == "autotuned")
    optimizer = build_optimizer(model, OptimizerSettings())
    most = GROUPS * MICRO_BATCHES if device.type == "cuda" else 2
    for micro_batches in (MICRO_BATCHES, MICRO_BATCHES // 2, 1) if device.type == "cuda" else (2, 1):
        groups = most // micro_batches
        name = f"{size} {kind}, {micro_batches} micro-batches"
        try:
            yield from _steps(name, model, optimizer, (size, kind), groups, micro_batches, modelled, kernels)
        except torch.OutOfMemoryError:
            yield Check(f"{name} of {groups * sum(FRAMES)} frames", None, "out of memory")
            return


def _steps(
    name: str,
    model: FoveatedVLM,
    optimizer: torch.optim.AdamW,
    modelled_as: tuple[str, Kind],
    groups: int,
    micro_batches: int,
    modelled: Callable[[], dict[tuple[str, str], float]],
    kernels: Path,
) -> Iterator[Check]:
    device = next(model.parameters()).device
    batch = videos(groups, frame_px=model.settings.vision.frame_px)
    flops = Cost(model, LOSS).batch(batch) * micro_batches

    def step(on_device: PackedBatch, labels: int) -> None:
        with model.casts.step(adds=True):
            for _ in range(micro_batches):
                with torch.autocast(device.type, torch.bfloat16):
                    objective = model(on_device, LOSS).objective
                (objective / (labels * micro_batches)).backward()
        norm = torch.stack(list(gradient_norms(optimizer).values())).norm()
        clip_gradients(optimizer, 1.0, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    smaller = videos(max(1, groups - 1), frame_px=model.settings.vision.frame_px)
    step(smaller.to(device), smaller.n_labels)  # another shape first, so that the measured step uses graphs compiled for any shape
    one = partial(step, batch.to(device), batch.n_labels)
    took, (size, kind) = _median_s(one, device), modelled_as
    yield Check(f"{name} of", float(len(batch.frames)), "frames")
    yield Check(f"{name} step", took * 1e3, "ms")
    if peak := peak_flops(device):
        mfu, goal = flops / took / peak, GOAL_MFU.get(size)
        yield Check(f"{name} MFU", mfu, "of the peak", f">= {goal}" if goal else "", mfu >= goal if goal else None)
    yield Check(f"{name} peak memory", peak_memory_gb(device), "GB")
    with profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as seen:
        one()
        _finish(device)
    ran = [event for event in seen.key_averages() if event.device_type.name == device.type.upper()]
    _write_kernels(kernels, name, ran)
    yield Check(f"{name} kernels", float(sum(event.count for event in ran)), "a step")
    if device.type == "cuda":
        yield Check(f"{name} kernels' time", sum(event.self_device_time_total for event in ran) / 1e3, "ms a step")
    expected = modelled().get((size, kind)) if micro_batches == MICRO_BATCHES else None
    if expected:
        yield Check(f"{name} step over the roofline's", took * 1e3 / expected, "1 is the model's bound")


def long_run(settings: ModelSettings, device: torch.device, folder: Path, steps: int) -> Iterator[Check]:
    """Run the trainer for `steps` steps, compiled on a GPU, and count recompilations, stalls, and waits for data and for the device."""
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
        places = host_waits(trainer.step)
        for place, count in places.most_common():
            yield Check(f"waits for the device: {place}", count / WATCHED_STEPS, "a step")
        waits = places.total() / WATCHED_STEPS
        yield Check("waits for the device", waits, "a step", f"<= {GOAL_WAITS}", waits <= GOAL_WAITS)
    trainer.parallelism.end()


def host_waits(step: Callable[[], object], steps: int = WATCHED_STEPS) -> Counter[str]:
    """Count where the host waits for a CUDA device in `steps` steps, by torch's sync debug mode: file and line -> count."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(steps):
                step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = (one for one in seen if "synchronizing CUDA operation" in str(one.message))
    return Counter(f"{'/'.join(Path(one.filename).parts[-3:])}:{one.lineno}" for one in waits)


def _write_kernels(file: Path, name: str, kernels: Sequence[Any]) -> None:
    """Append a line for each kernel of a step, slowest first."""
    with file.open("a") as lines:
        for event in sorted(kernels, key=lambda event: -event.self_device_time_total):
            said = {"step": name, "kernel": event.key, "count": event.count, "ms": event.self_device_time_total / 1e3}
            print(json.dumps(said), file=lines)


def _trainer(settings: ModelSettings, device: torch.device, folder: Path, steps: int) -> Trainer:
    px, workers = settings.vision.frame_px, 6 if device.type == "cuda" else 0
    shards = write_videos(folder / "shards", frame_px=px, videos=64 if px == FRAME_PX else 4, vocabulary=VOCABULARY)
    job = speed_job(folder / "long", shards, settings, steps=steps, workers=workers, device=device.type)
    changes = {"run.steps": steps + 16, "run.batch_samples": LONG_SAMPLES, "run.compile": device.type == "cuda"}
    recipe: Recipe = job.recipe.with_changes(changes)
    world = World.initialize({}, device.type)
    trainer = Trainer(recipe, world, "checks", input_digests(recipe), has_wandb_key=False)
    trainer.go_to(None, trainer.state)
    return trainer


def _within(ends: float, kind: Kind, what: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """Run a check, or report that there was no time or memory for it."""
    if time.monotonic() + EXPECTED_S[kind] > ends:
        yield Check(f"{what} {kind}", None, "left out: no time")
        return
    try:
        yield from check()
    except torch.OutOfMemoryError:
        yield Check(f"{what} {kind}", None, "out of memory")


def _modelled(sizes: list[str], card: str | None) -> dict[tuple[str, str], float]:
    """Return the roofline's milliseconds per step by (size, kind), computed in another process while the GPU works."""
    if card not in ("A100", "H100", "H200"):
        return {}
    command = [sys.executable, "-m", "benchmarks.roofline", "--json", "--cards", card, "--threads", "2", "--sizes", *sizes]
    rows = [json.loads(line) for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()]
    return {(row["size"], row["kind"]): row["ms"] for row in rows if row["part"] == "step"}


def _tests() -> Check:
    command = [sys.executable, "-m", "pytest", "tests/train/test_cuda.py", "-q", "-p", "no:cacheprovider", "-n", "4"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-3000:], file=sys.stderr)
    return Check("tests/train/test_cuda.py", float(done.returncode), "exit status", "0", done.returncode == 0)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
