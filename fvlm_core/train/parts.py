"""Break down the time of a training step by part of the model and by operation.

Parts are timed around the model's methods, with device synchronisation. The remainder is the backward pass and the training loop. The
profiler's table and trace show single operations.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fvlm_core.manifest import write_atomically
from fvlm_core.train.loop import Trainer
from fvlm_core.train.profiling import TABLE_ROWS

METHODS = {"encode": ("encode",), "query": ("read_coarse", "read_fine", "queries"), "LLM": ("run_llm",), "loss": ("_cross_entropy",)}
"""Parts of the forward pass, and the model's methods that belong to each."""
REST = "backward and the rest"
STEPS = 2


def time_parts(trainer: Trainer) -> dict[str, float]:
    """Return the share of a step's time by part: data, parts of the forward pass, optimizer, and the rest. Shares add up to 1."""
    device, seconds = trainer.world.device, dict.fromkeys(["data", *METHODS, "optimizer"], 0.0)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            _finish(device)
            started = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                _finish(device)
                seconds[part] += time.perf_counter() - started

        return call

    for part, names in METHODS.items():
        for name in names:
            setattr(trainer.model, name, timed(part, getattr(trainer.model, name)))
    take, waited = trainer.optimizer.step, trainer.clock.waited
    trainer.optimizer.step = timed("optimizer", take)
    try:
        started = time.perf_counter()
        for _ in range(STEPS):
            trainer.step()
        _finish(device)
        total = time.perf_counter() - started
    finally:
        trainer.optimizer.step = take
        for names in METHODS.values():
            for name in names:
                delattr(trainer.model, name)
    seconds["data"] = trainer.clock.waited - waited
    seconds[REST] = max(0.0, total - sum(seconds.values()))
    return {part: value / total for part, value in seconds.items()}


def profile_steps(trainer: Trainer, output: Path, name: str) -> list[str]:
    """Profile one step. Write `NAME-operations.txt` and `NAME-trace.json.gz` (for https://ui.perfetto.dev); return the file names."""
    gpu = trainer.world.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiled:
        trainer.step()
        _finish(trainer.world.device)
    files = [f"{name}-operations.txt", f"{name}-trace.json.gz"]
    table = profiled.key_averages().table(sort_by="self_cuda_time_total" if gpu else "self_cpu_time_total", row_limit=TABLE_ROWS)
    write_atomically(output / files[0], (str(table) + "\n").encode())
    profiled.export_chrome_trace(str(output / files[1]))
    return files


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
