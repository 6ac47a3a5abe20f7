"""Measure and tune the training speed of a recipe: `python -m fvlm_core.train.speed job.yaml`.

Every variant runs real training steps on real data. `naive` is an ordinary implementation with the recipe's batch and precision
(`fvlm_core.train.naive`). Settings are tuned one after another, each on top of the best so far. Two variants are always compared by
interleaved steps, and a gain that the confidence interval does not confirm is not accepted (`fvlm_core.train.paired_timing`). At the
end, naive and tuned are measured once more, with a breakdown of their time (`fvlm_core.train.parts`). Tuning does not change what a step
computes.
"""

import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from fvlm_core.cli import run_job
from fvlm_core.config import MicroBatch, Recipe
from fvlm_core.errors import UserError
from fvlm_core.manifest import file_entries, write_atomically
from fvlm_core.progress import Progress
from fvlm_core.train.bench import Bench, Running
from fvlm_core.train.jobs import CHOSEN_FILE, PLOT_FILE, SWEPT, TABLE_FILE, CheckpointAdvice, SpeedJob, SpeedReport, SpeedRow, Sweep
from fvlm_core.train.loop import Trainer
from fvlm_core.train.naive import NaiveTrainer
from fvlm_core.train.paired_timing import Ratio, checkpoint_interval_s
from fvlm_core.train.parts import profile_steps, time_parts

DISK_PROBE_BYTES = 1 << 26
"""Bytes written and fsynced to measure the speed of the disk."""


def candidates(sweep: Sweep, own: MicroBatch, device: str) -> dict[str, list[Any]]:
    """Return the values to try, by recipe path, in tuning order. `own`: the recipe's micro-batch."""
    gpu = device == "cuda"
    defaults: dict[str, list[Any]] = {
        "micro_batch": [
            MicroBatch(frames=max(1, int(own.frames * part)), tokens=max(1, int(own.tokens * part))) for part in (1, 2, 0.5, 0.25)
        ],
        "threads": [1] if gpu else sorted({1, os.cpu_count() or 1}),
        "precision": ["bf16"] if gpu else ["fp32"],
        "compile": [False, True] if gpu else [False],
        "autotune": [False, True] if gpu else [False],
        "workers": [0, 4] if gpu else [0],
        "gradient_checkpointing": [False],
    }
    chosen = {name: getattr(sweep, name) for name in SWEPT}
    values = {path: chosen[name] if chosen[name] is not None else defaults[name] for name, path in SWEPT.items()}
    return {path: [one.model_dump() if isinstance(one, MicroBatch) else one for one in tried] for path, tried in values.items()}


def tune(bench: Bench, options: dict[str, list[Any]], progress: Progress) -> tuple[list[SpeedRow], dict[str, Any]]:
    """Tune one setting after another, starting with `naive_settings`. Returns the rows and the best settings.

    A value replaces the best so far only if the lower bound of its relative gain exceeds `min_gain`.
    """
    settings = naive_settings(bench.job.recipe)
    best = bench.start("packed", settings)
    if isinstance(best, SpeedRow):
        settings = settings | {"run.gradient_checkpointing": True}
        best = bench.start("packed+gradient_checkpointing", settings)
        if isinstance(best, SpeedRow):
            raise UserError("a step does not fit into memory", where="recipe.run.micro_batch", fix="lower it, or measure on a larger GPU")
    rows: list[SpeedRow] = []
    for path, values in options.items():
        for value in values:
            if settings[path] == value:
                continue
            tried = settings | {path: value}
            other = bench.start(f"{path.split('.')[1]}={_words(value)}", tried)
            if isinstance(other, SpeedRow):
                rows.append(other)
            else:
                ratio, _, row = bench.compare(best, other, bench.job.sweep_steps)
                rows.append(row.model_copy(update={"over": best.row.variant, **_gain(ratio)}))
                if ratio.low > 1 + bench.job.min_gain:
                    best, settings = other, tried
                del other
            bench.free()
            progress.update(len(rows), note=rows[-1].variant)
    return rows, settings


def naive_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the tunable settings of an ordinary implementation: the recipe's batch and precision, eager, a plain loader."""
    return {
        "run.micro_batch": recipe.run.micro_batch.model_dump(),
        "run.threads": recipe.run.threads,
        "run.precision": recipe.run.precision,
        "run.compile": False,
        "run.autotune": False,
        "data.workers": 0,
        "run.gradient_checkpointing": False,
    }


def _gain(ratio: Ratio) -> dict[str, Any]:
    high = ratio.high if math.isfinite(ratio.high) else None
    return {"gain": ratio.value, "gain_low": ratio.low, "gain_high": high, "pairs": ratio.pairs}


def _words(value: Any) -> str:
    """Format a value for the name of a variant."""
    return ", ".join(f"{count} {unit}" for unit, count in value.items()) if isinstance(value, dict) else str(value)


def run(job: SpeedJob) -> SpeedReport:
    """Run the job: measure and tune, then write the table, the plot, the chosen settings, the profiles and the manifest."""
    started = time.perf_counter()
    job.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(job)
    own, device = job.recipe.run.micro_batch, bench.world.device.type
    options = candidates(job.sweep, own, device)
    largest = bench.largest_micro_batch(own, naive_settings(job.recipe)) if device == "cuda" and job.sweep.micro_batch is None else None
    if largest is not None:
        options["run.micro_batch"].append(largest.model_dump())
    progress = Progress(job.output, total=2 + sum(map(len, options.values())))
    rows, chosen = tune(bench, options, progress)
    naive, tuned = bench.start("naive", naive_settings(job.recipe), NaiveTrainer), bench.start("tuned", chosen)
    if isinstance(tuned, SpeedRow):
        raise UserError("a step does not fit into memory", where="recipe.run.micro_batch", fix="lower it, or measure on a larger GPU")
    ratio = None
    if isinstance(naive, SpeedRow):  # only packed samples fit into memory, so there is no ratio
        first, last = naive, bench.row(tuned, [tuned.step() for _ in range(job.steps)])
    else:
        ratio, first, last = bench.compare(naive, tuned, job.steps)
        last = last.model_copy(update={"over": "naive", **_gain(ratio)})
    compared = [("naive", naive), ("tuned", tuned)]
    parts = {name: time_parts(one.trainer) for name, one in compared if isinstance(one, Running)}
    profiles = [file for name, one in compared if isinstance(one, Running) for file in profile_steps(one.trainer, job.output, name)]
    if device == "cuda":
        last = last.model_copy(update={"gpu_busy": bench.busy_share(tuned.trainer)})
    rows = [first, *rows, last]
    shutil.rmtree(bench.scratch, ignore_errors=True)
    write_table(rows, job.output / TABLE_FILE)
    plot(rows, job.output / PLOT_FILE)
    write_atomically(job.output / CHOSEN_FILE, yaml.safe_dump(chosen, sort_keys=True).encode())
    progress.update(progress.total)
    return SpeedReport(
        name="speed",
        settings_hash=job.hash(exclude={"output"}),
        inputs=bench.inputs,
        files=[
            *file_entries(job.output, [CHOSEN_FILE]),
            *file_entries(job.output, [TABLE_FILE, PLOT_FILE, *profiles], identity=False),
        ],
        seconds=time.perf_counter() - started,
        device=torch.cuda.get_device_name(bench.world.device) if device == "cuda" else f"cpu, {os.cpu_count()} cores",
        rows=rows,
        naive_samples_per_s=first.samples_per_s,
        tuned_samples_per_s=last.samples_per_s or 0.0,
        speedup=None if ratio is None else ratio.value,
        speedup_low=None if ratio is None else ratio.low,
        speedup_high=None if ratio is None or math.isinf(ratio.high) else ratio.high,
        pairs=0 if ratio is None else ratio.pairs,
        bound=_bound(parts["tuned"], last),
        parts=parts,
        largest_micro_batch=largest,
        checkpoint=_checkpoint(job, tuned.trainer, last.step_s or 1.0),
        chosen=chosen,
    ).write(job.output)


def _bound(parts: dict[str, float], row: SpeedRow) -> str:
    """Describe what limits the speed of a tuned step."""
    part, share = max(parts.items(), key=lambda item: item[1])
    reached = f"MFU {row.mfu:.0%}" if row.mfu else f"{row.share_of_matmul or 0:.0%} of a plain matrix product's FLOP/s"
    return f"most of a tuned step is {part} ({share:.0%}); data {parts['data']:.0%}; {reached}"


def _checkpoint(job: SpeedJob, trainer: Trainer, step_s: float) -> CheckpointAdvice:
    """Measure the disk; estimate the time to write a checkpoint and the best number of steps between two."""
    size = sum(parameter.numel() * (3 if parameter.requires_grad else 1) * 4 for parameter in trainer.model.parameters())
    probe = job.output / ".disk"
    block = os.urandom(1 << 20)
    count = max(1, min(size, DISK_PROBE_BYTES) // len(block))
    started = time.perf_counter()
    with probe.open("wb") as stream:
        for _ in range(count):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    per_s = count * len(block) / (time.perf_counter() - started)
    probe.unlink()
    write_s = size / per_s
    interval = checkpoint_interval_s(write_s, job.hours_to_failure * 3600)
    return CheckpointAdvice(
        bytes=size, bytes_per_s=per_s, write_s=write_s, hours_to_failure=job.hours_to_failure, steps=max(1, round(interval / step_s))
    )


def write_table(rows: list[SpeedRow], path: Path) -> None:
    """Write a CSV with a row per variant; settings are columns."""
    records = [row.model_dump(exclude={"settings"}) | row.settings for row in rows]
    pd.DataFrame(records).to_csv(path, index=False)


def plot(rows: list[SpeedRow], path: Path) -> None:
    """Plot samples per second as bars, with naive and tuned highlighted."""
    from matplotlib.figure import Figure  # not needed for measurements

    figure = Figure(figsize=(8, 1 + 0.35 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    colours = {"naive": "tab:gray", "tuned": "tab:green"}
    names = [f"{number}. {row.variant}" for number, row in enumerate(rows)]
    bars = axes.barh(names, [row.samples_per_s or 0 for row in rows], color=[colours.get(row.variant, "tab:blue") for row in rows])
    axes.bar_label(bars, [row.failure or f"{row.samples_per_s:.3g}" for row in rows], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("training samples per second")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_job(SpeedJob, run)
