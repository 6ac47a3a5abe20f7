"""How fast training runs, naive and tuned: `python -m fvlm_core.train.speed job.yaml`.

Every variant is the real training step on the real data. Naive is an ordinary implementation with the recipe's batch and precision
(`naive`). One setting after the other is tuned, each on top of the best so far; two variants are always measured in turn, step by step,
and a gain within their spread is none (`race`). At the end naive and tuned are measured once more, with where their time goes (`parts`).
Nothing here changes what a tuned step computes.
"""

import gc
import math
import os
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from fvlm_core.cli import run_job
from fvlm_core.config import MicroBatch, Recipe
from fvlm_core.errors import UserError
from fvlm_core.manifest import file_entries, write_atomically
from fvlm_core.progress import Progress
from fvlm_core.train.distributed import World
from fvlm_core.train.folder import input_digests
from fvlm_core.train.jobs import CHOSEN_FILE, PLOT_FILE, SWEPT, TABLE_FILE, CheckpointAdvice, SpeedJob, SpeedReport, SpeedRow, Sweep
from fvlm_core.train.loop import Trainer
from fvlm_core.train.metrics import peak_flops, peak_memory_gb, reset_peak_memory
from fvlm_core.train.naive import NaiveTrainer
from fvlm_core.train.nvml import gpu_readings
from fvlm_core.train.parts import profile_steps, time_parts
from fvlm_core.train.race import Ratio, alternate, checkpoint_interval_s, largest_that_fits, ratio_of

MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
"""Large enough to be compute-bound, small enough to take no time."""
MATMUL_REPEATS = 5
DISK_PROBE_BYTES = 1 << 26
"""Written, and waited for, to learn the disk's speed."""


@dataclass
class Running:
    """A warmed-up variant."""

    row: SpeedRow
    """Without what is measured."""
    trainer: Trainer
    threads: int
    peak_memory_gb: float

    def step(self) -> float:
        """Seconds of one more step, on the variant's own threads."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        started = time.perf_counter()
        self.trainer.step()
        return time.perf_counter() - started


class Bench:
    """Measures variants of one recipe in this process."""

    def __init__(self, job: SpeedJob) -> None:
        self.job = job
        self.inputs = input_digests(job.recipe)
        self.world = World.join({}, job.recipe.run.device)
        self.default_threads = torch.get_num_threads()
        self.scratch = job.output / ".scratch"
        self.matmul: dict[tuple[int, str], float] = {}

    def measure(self, variant: str, settings: dict[str, Any], *, busy: bool = False) -> SpeedRow:
        """Median step of the recipe with `settings`; a variant that runs out of GPU memory is a row with a failure.

        `busy` also measures for how much of the time the GPU computes.
        """
        running = self.start(variant, settings)
        if isinstance(running, SpeedRow):
            return running
        seconds: list[float] = []
        while len(seconds) < self.job.steps and (len(seconds) < 2 or sum(seconds) < self.job.max_variant_s):
            seconds.append(running.step())
        row = self.row(running, seconds)
        share = self._busy_share(running.trainer) if busy and self.world.device.type == "cuda" else None
        self.free()
        return row.model_copy(update={"gpu_busy": share})

    def start(self, variant: str, settings: dict[str, Any], kind: type[Trainer] = Trainer) -> "Running | SpeedRow":
        """A warmed-up trainer of the recipe with `settings`, or the row that says why there is none."""
        row = SpeedRow(variant=variant, settings=settings, steps=0, load_average=os.getloadavg()[0])
        recipe = self._recipe(settings)
        try:
            if not recipe.run.threads:
                torch.set_num_threads(self.default_threads)
            trainer = kind(recipe, self.world, "speed", self.inputs, has_wandb_key=False)
            trainer.may_shrink = False  # what does not fit is a result here
            trainer.go_to(None, trainer.state)
            reset_peak_memory(self.world.device)
            for _ in range(self.job.warmup_steps):
                trainer.step()
            trainer.clock = type(trainer.clock)()
            return Running(row, trainer, torch.get_num_threads(), peak_memory_gb(self.world.device))
        except torch.OutOfMemoryError:
            self.free()
            return row.model_copy(update={"failure": "out of memory"})

    def race(self, first: "Running", second: "Running", pairs: int) -> tuple[Ratio, SpeedRow, SpeedRow]:
        """The second's speed over the first's, from steps in turn, and the rows of both."""
        for running in (first, second):
            running.trainer.clock = type(running.trainer.clock)()
        seconds = alternate(first.step, second.step, pairs=pairs, max_s=2 * self.job.max_variant_s)
        return ratio_of(*seconds), self.row(first, seconds[0]), self.row(second, seconds[1])

    def row(self, running: "Running", seconds: list[float]) -> SpeedRow:
        """The row of the steps that the running variant has just made."""
        trainer, clock, step_s = running.trainer, running.trainer.clock, statistics.median(seconds)
        per_s = 1 / (step_s * len(seconds))  # sums over the steps, at the median step's pace
        flops_per_s, peak = clock.flops * per_s, peak_flops(self.world.device)
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [step_s] * 3
        return running.row.model_copy(
            update={
                "steps": len(seconds),
                "step_s": step_s,
                "step_s_low": quartiles[0],
                "step_s_high": quartiles[2],
                "samples_per_s": clock.samples * per_s,
                "frames_per_s": clock.frames * per_s,
                "tokens_per_s": clock.tokens * per_s,
                "gflops_per_s": flops_per_s / 1e9,
                "share_of_matmul": flops_per_s / self._matmul_flops(trainer.recipe.run.precision),
                "mfu": flops_per_s / peak if peak else None,
                "peak_memory_gb": running.peak_memory_gb,
                **gpu_readings(self.world.device),
                "data_wait_share": clock.waited / clock.seconds,
            }
        )

    def largest_micro_batch(self, own: MicroBatch, settings: dict[str, Any]) -> MicroBatch | None:
        """The largest budgets, in proportion to the recipe's own, whose step fits into the GPU; None where not even the least does."""
        units = 16  # sixteenths of the recipe's own

        def scaled(size: int) -> MicroBatch:
            return MicroBatch(frames=max(1, own.frames * size // units), tokens=max(1, own.tokens * size // units))

        def fits(size: int) -> bool:
            running = self.start("", settings | {"run.micro_batch": scaled(size).model_dump()})
            self.free()
            return isinstance(running, Running)

        size = largest_that_fits(fits, units, most=units * self.job.most_batches)
        return None if size is None else scaled(size)

    def free(self) -> None:
        """Give memory back."""
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def _recipe(self, settings: dict[str, Any]) -> Recipe:
        # the loader reads ahead: a few more steps than are taken
        steps = self.job.warmup_steps + self.job.steps + len(SWEPT) * 4 * self.job.sweep_steps + 16
        fixed = {"run.steps": steps, "run.budget_flops": None, "run.wandb": "disabled", "output": str(self.scratch)}
        return self.job.recipe.with_changes(fixed | settings, where="the speed job's recipe")

    def _matmul_flops(self, precision: str) -> float:
        """FLOP/s of a plain large matrix product on the present threads or GPU."""
        key = (torch.get_num_threads(), precision)
        if key not in self.matmul:
            side, device = MATMUL_SIDE[self.world.device.type], self.world.device
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
            seconds = []
            for _ in range(1 + MATMUL_REPEATS):
                self._finish()
                started = time.perf_counter()
                torch.mm(left, right)
                self._finish()
                seconds.append(time.perf_counter() - started)
            self.matmul[key] = 2 * side**3 / statistics.median(seconds[1:])
        return self.matmul[key]

    def _busy_share(self, trainer: Trainer) -> float:
        """Share of two steps' time during which a kernel runs."""
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            started = time.perf_counter()
            for _ in range(2):
                trainer.step()
            self._finish()
            seconds = time.perf_counter() - started
        return min(1.0, sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6 / seconds)

    def _finish(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()


def candidates(sweep: Sweep, own: MicroBatch, device: str) -> dict[str, list[Any]]:
    """The values to try by recipe path, in the order of tuning; `own`: the recipe's micro-batch."""
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
    """From the recipe's own settings, setting after setting, what there is to try. Returns the rows and the best settings.

    A value replaces the best so far only where the lower end of its gain is above `min_gain`.
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
                ratio, _, row = bench.race(best, other, bench.job.sweep_steps)
                rows.append(row.model_copy(update={"over": best.row.variant, **_gain(ratio)}))
                if ratio.low > 1 + bench.job.min_gain:
                    best, settings = other, tried
                del other
            bench.free()
            progress.update(len(rows), note=rows[-1].variant)
    return rows, settings


def naive_settings(recipe: Recipe) -> dict[str, Any]:
    """What a sweep turns, as an ordinary implementation has it: the recipe's batch and precision, eager, a plain loader."""
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
    """A value as a variant's name says it."""
    return ", ".join(f"{count} {unit}" for unit, count in value.items()) if isinstance(value, dict) else str(value)


def run(job: SpeedJob) -> SpeedReport:
    """Measure, choose, and write the table, the plot, the choice, the profiles and the manifest."""
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
    if isinstance(naive, SpeedRow):  # padding does not fit where packing does: then there is no ratio
        first, last = naive, bench.row(tuned, [tuned.step() for _ in range(job.steps)])
    else:
        ratio, first, last = bench.race(naive, tuned, job.steps)
        last = last.model_copy(update={"over": "naive", **_gain(ratio)})
    raced = [("naive", naive), ("tuned", tuned)]
    parts = {name: time_parts(one.trainer) for name, one in raced if isinstance(one, Running)}
    profiles = [file for name, one in raced if isinstance(one, Running) for file in profile_steps(one.trainer, job.output, name)]
    if device == "cuda":
        last = last.model_copy(update={"gpu_busy": bench._busy_share(tuned.trainer)})
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
    """What a faster step would have to shorten."""
    part, share = max(parts.items(), key=lambda item: item[1])
    reached = f"MFU {row.mfu:.0%}" if row.mfu else f"{row.share_of_matmul or 0:.0%} of a plain matrix product's FLOP/s"
    return f"most of a tuned step is {part} ({share:.0%}); data {parts['data']:.0%}; {reached}"


def _checkpoint(job: SpeedJob, trainer: Trainer, step_s: float) -> CheckpointAdvice:
    """How long a checkpoint takes to write here, and how many steps should lie between two."""
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
    """A CSV line per variant; its settings are columns."""
    records = [row.model_dump(exclude={"settings"}) | row.settings for row in rows]
    pd.DataFrame(records).to_csv(path, index=False)


def plot(rows: list[SpeedRow], path: Path) -> None:
    """Bars of samples per second, naive and tuned in other colours."""
    from matplotlib.figure import Figure  # here: the measuring does not need it

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
