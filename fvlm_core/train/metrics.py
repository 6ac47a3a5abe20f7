"""Metrics of a run: one row per evaluation in `metrics.csv`, also sent to Weights & Biases."""

import csv
import io
import math
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW

from fvlm_core.config import OptimizerSettings, Recipe
from fvlm_core.manifest import write_atomically
from fvlm_core.model.names import ROLES
from fvlm_core.train.distributed import World
from fvlm_core.train.schedules import learning_rates
from fvlm_core.train.state import Clock, RunState

PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200 NVL": 835,
    "H200": 989,
    "A100": 312,
    "L40S": 362,
    "A6000": 155,
    "4090": 165,
    "5090": 209,
    "B200": 2250,
}
"""Dense bf16 tensor-core peaks in TFLOP/s from NVIDIA's data sheets (those of Hopper cards state twice as much, with sparsity). The first
key that is part of the device's name applies."""


def columns(passes: Sequence[str]) -> list[str]:
    """Return the columns of `metrics.csv` for a run with these passes."""
    return [
        *("step", "samples", "frames", "label_tokens", "flops"),
        *("val_loss", *(f"val_{name}" for name in passes), "train_loss", *(f"train_{name}" for name in passes)),
        *(f"grad_norm_{role}" for role in ROLES),
        *(f"lr_{role}" for role in ROLES),
        *("entropy", "skipped_steps", "samples_per_s", "frames_per_s", "tokens_per_s", "mfu", "data_wait_share", "peak_memory_gb"),
    ]


def metrics_row(
    state: RunState, clock: Clock, optimizer: AdamW, settings: OptimizerSettings, *, steps: int, val_loss: float, world: World
) -> dict[str, Any]:
    """Build a row of `metrics.csv` from the current state and the sums since the previous row. `steps`: total steps of the run."""
    window, rates = state.window, learning_rates(settings, state.step - 1, steps)
    units = max(1, window.units) if window.steps else math.nan  # unknown if every step was skipped
    trained = {group["role"] for group in optimizer.param_groups}
    peak = peak_flops(world.device)
    return {
        "step": state.step,
        "samples": state.samples,
        "frames": state.frames,
        "label_tokens": state.label_tokens,
        "flops": state.flops,
        "val_loss": val_loss,
        **{f"val_{name}": value for name, value in state.val_losses.items()},
        "train_loss": window.objective / units,
        **{f"train_{name}": value / units for name, value in window.losses.items()},
        **{f"grad_norm_{role}": value / window.steps for role, value in window.norms.items()},
        **{f"lr_{role}": rate if role in trained else 0.0 for role, rate in rates.items()},
        "entropy": window.entropy / window.frames if window.frames else None,
        "skipped_steps": state.skipped_steps,
        **clock.rates(peak * world.size if peak else None),
        "peak_memory_gb": peak_memory_gb(world.device),
    }


class MetricsFile:
    """`metrics.csv`, with one row per step, in step order. `append` returns once a row is on disk."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names = path, list(names)

    def truncate(self, step: int) -> None:
        """Drop the rows after `step`, and an incomplete last line of a killed run. Creates the file if it does not exist."""
        kept = []
        if self.path.is_file():
            whole_lines = self.path.read_bytes().decode().splitlines(keepends=True)
            if whole_lines and not whole_lines[-1].endswith("\n"):  # killed during a write
                whole_lines.pop()
            kept = [row for row in csv.DictReader(whole_lines) if int(row["step"]) <= step]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.names)
        writer.writeheader()
        writer.writerows(kept)
        write_atomically(self.path, text.getvalue().encode())

    def append(self, row: dict[str, Any]) -> None:
        """Append a row; missing columns stay empty. Raises ValueError for an unknown column."""
        with self.path.open("a", newline="") as stream:
            csv.DictWriter(stream, self.names).writerow(row)
            stream.flush()
            os.fsync(stream.fileno())


class Tracker:
    """Weights & Biases, started with the first row, because importing and starting it takes most of a second.

    Without an API key it writes offline files for `wandb sync`. If wandb cannot be reached, the run continues without it.
    """

    def __init__(self, recipe: Recipe, identity: str, *, has_key: bool) -> None:
        self.recipe, self.identity = recipe, identity
        setting = recipe.run.wandb
        self.mode = ("online" if has_key else "offline") if setting == "auto" else setting
        self.run: Any = None

    def log(self, row: dict[str, Any]) -> None:
        """Log a row."""
        if self.mode == "disabled":
            return
        import wandb  # imported here because it is slow and only needed for rows with wandb enabled

        try:
            if self.run is None:
                self.run = self._start(wandb)
            self.run.log(row)
        except (wandb.Error, OSError) as error:
            print(f"wandb is not reachable, the run goes on without it: {error}", flush=True)
            self.mode = "disabled"

    def finish(self) -> None:
        """Finish the wandb run, which uploads the remaining rows."""
        if self.run is not None:
            self.run.finish()

    def _start(self, wandb: Any) -> Any:
        self.recipe.output.mkdir(parents=True, exist_ok=True)
        offline = self.mode == "offline"
        run = wandb.init(
            project=f"foveated-vlm-{self.recipe.phase}",
            name=self.recipe.name,
            id=self.identity[:16],
            resume="allow" if not offline else None,
            dir=self.recipe.output,
            config=self.recipe.model_dump(mode="json"),
            settings=wandb.Settings(
                mode=self.mode, console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=offline
            ),
        )
        run.define_metric("*", step_metric="step")
        return run


def peak_flops(device: torch.device) -> float | None:
    """Return the peak FLOP/s of the device's bf16 tensor cores; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak that `peak_memory_gb` reports. On CPU, only supported on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB since the start or `reset_peak_memory`: allocated memory on a GPU, otherwise resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    # getrusage's peak of a process includes that of its parent
    own = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if own is None else own) * 1024 / 1e9
