"""How fast training runs, naive and tuned: `python -m fvlm_core.train.speed job.yaml`.

Every variant is the real training step on the real data. One setting after the other is tuned, each on top of the best so far; at
the end the naive settings and the chosen ones are measured once more, side by side. Nothing here changes what a step computes.
"""

import gc
import os
import shutil
import statistics
import time
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
from fvlm_core.train.jobs import CHOSEN_FILE, NAIVE, PLOT_FILE, SWEPT, TABLE_FILE, SpeedJob, SpeedReport, SpeedRow, Sweep
from fvlm_core.train.loop import Trainer
from fvlm_core.train.metrics import peak_flops, peak_memory_gb, reset_peak_memory

MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
"""Large enough to be compute-bound, small enough to take no time."""
MATMUL_REPEATS = 5
FINAL_ROUNDS = 2
"""How often naive and tuned take turns at the end."""


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
        load = os.getloadavg()[0]
        row = SpeedRow(variant=variant, settings=settings, steps=0, load_average=load)
        try:
            return self._measure(row, self._recipe(settings), busy=busy)
        except torch.OutOfMemoryError:
            return row.model_copy(update={"failure": "out of memory"})
        finally:
            gc.collect()
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()

    def _measure(self, row: SpeedRow, recipe: Recipe, *, busy: bool) -> SpeedRow:
        if not recipe.run.threads:
            torch.set_num_threads(self.default_threads)
        trainer = Trainer(recipe, self.world, "speed", self.inputs, has_wandb_key=False)
        trainer.may_shrink = False  # what does not fit is a result here
        trainer.go_to(None, trainer.state)
        for _ in range(self.job.warmup_steps):
            trainer.step()
        reset_peak_memory(self.world.device)
        trainer.clock = type(trainer.clock)()
        seconds: list[float] = []
        while len(seconds) < self.job.steps and (len(seconds) < 2 or sum(seconds) < self.job.max_variant_s):
            started = time.perf_counter()
            trainer.step()
            seconds.append(time.perf_counter() - started)
        clock, step_s = trainer.clock, statistics.median(seconds)
        per_s = 1 / (step_s * len(seconds))  # sums over the steps, at the median step's pace
        flops_per_s, peak = clock.flops * per_s, peak_flops(self.world.device)
        return row.model_copy(
            update={
                "steps": len(seconds),
                "step_s": step_s,
                "samples_per_s": clock.samples * per_s,
                "frames_per_s": clock.frames * per_s,
                "tokens_per_s": clock.tokens * per_s,
                "gflops_per_s": flops_per_s / 1e9,
                "share_of_matmul": flops_per_s / self._matmul_flops(recipe.run.precision),
                "mfu": flops_per_s / peak if peak else None,
                "peak_memory_gb": peak_memory_gb(self.world.device),
                "data_wait_share": clock.waited / clock.seconds,
                "gpu_busy": self._busy_share(trainer) if busy and self.world.device.type == "cuda" else None,
            }
        )

    def _recipe(self, settings: dict[str, Any]) -> Recipe:
        # the loader reads ahead: a few more steps than are taken
        steps = self.job.warmup_steps + self.job.steps + 8
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
        "workers": [0, 4] if gpu else [0],
        "gradient_checkpointing": [False],
    }
    chosen = {name: getattr(sweep, name) for name in SWEPT}
    values = {path: chosen[name] if chosen[name] is not None else defaults[name] for name, path in SWEPT.items()}
    return {path: [one.model_dump() if isinstance(one, MicroBatch) else one for one in tried] for path, tried in values.items()}


def tune(bench: Bench, options: dict[str, list[Any]], progress: Progress) -> tuple[list[SpeedRow], dict[str, Any]]:
    """Measure naive settings and, setting after setting, what there is to try. Returns all rows and the best settings."""
    rows = [bench.measure("naive", NAIVE)]
    settings, best = dict(NAIVE), rows[0]
    for path, values in options.items():
        for value in values:
            if settings[path] == value:
                continue
            tried = settings | {path: value}
            row = bench.measure(f"{path.split('.')[1]}={_words(value)}", tried)
            if row.failure:
                row = bench.measure(f"{row.variant}+gradient_checkpointing", tried := tried | {"run.gradient_checkpointing": True})
            rows.append(row)
            progress.update(len(rows), note=row.variant)
            if row.samples_per_s and row.samples_per_s > (best.samples_per_s or 0) * (1 + bench.job.min_gain):
                best, settings = row, tried
    return rows, settings


def _words(value: Any) -> str:
    """A value as a variant's name says it."""
    return ", ".join(f"{count} {unit}" for unit, count in value.items()) if isinstance(value, dict) else str(value)


def run(job: SpeedJob) -> SpeedReport:
    """Measure, choose, and write the table, the plot, the choice and the manifest."""
    started = time.perf_counter()
    job.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(job)
    options = candidates(job.sweep, job.recipe.run.micro_batch, bench.world.device.type)
    progress = Progress(job.output, total=1 + sum(map(len, options.values())) + 2 * FINAL_ROUNDS)
    rows, chosen = tune(bench, options, progress)
    rounds = [(bench.measure("naive", NAIVE, busy=True), bench.measure("tuned", chosen, busy=True)) for _ in range(FINAL_ROUNDS)]
    naive, tuned = (min(turn, key=lambda row: row.step_s or float("inf")) for turn in zip(*rounds, strict=True))
    if not (naive.samples_per_s and tuned.samples_per_s):
        raise UserError("the naive settings do not fit into memory", where="recipe.model", fix="measure a smaller model or on a larger GPU")
    rows = [naive, *rows[1:], tuned]
    shutil.rmtree(bench.scratch, ignore_errors=True)
    write_table(rows, job.output / TABLE_FILE)
    plot(rows, job.output / PLOT_FILE)
    write_atomically(job.output / CHOSEN_FILE, yaml.safe_dump(chosen, sort_keys=True).encode())
    progress.update(progress.total)
    timings = file_entries(job.output, [TABLE_FILE, PLOT_FILE], identity=False)
    gpu = bench.world.device.type == "cuda"
    return SpeedReport(
        name="speed",
        settings_hash=job.hash(exclude={"output"}),
        inputs=bench.inputs,
        files=[*file_entries(job.output, [CHOSEN_FILE]), *timings],
        seconds=time.perf_counter() - started,
        device=torch.cuda.get_device_name(bench.world.device) if gpu else f"cpu, {os.cpu_count()} cores",
        rows=rows,
        naive_samples_per_s=naive.samples_per_s,
        tuned_samples_per_s=tuned.samples_per_s,
        speedup=tuned.samples_per_s / naive.samples_per_s,
        chosen=chosen,
    ).write(job.output)


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
