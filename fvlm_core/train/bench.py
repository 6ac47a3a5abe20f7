"""Benchmark variants of a recipe: real training steps on real data, warmed up and, for comparisons, interleaved (see `compare`)."""

import gc
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fvlm_core.config import MicroBatch, Recipe
from fvlm_core.train.distributed import World
from fvlm_core.train.folder import input_digests
from fvlm_core.train.jobs import SWEPT, SpeedJob, SpeedRow
from fvlm_core.train.loop import Trainer
from fvlm_core.train.metrics import peak_flops, peak_memory_gb, reset_peak_memory
from fvlm_core.train.nvml import gpu_readings
from fvlm_core.train.paired_timing import Ratio, alternate, largest_that_fits, ratio_of

MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
"""Side of the reference matrix product by device: large enough to be compute-bound, small enough to be quick."""
MATMUL_REPEATS = 5


@dataclass
class Running:
    """A warmed-up variant."""

    row: SpeedRow
    """The variant's row, before any measurement."""
    trainer: Trainer
    threads: int
    peak_memory_gb: float

    def step(self) -> float:
        """Run one step with the variant's number of threads; return its seconds."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        started = time.perf_counter()
        self.trainer.step()
        return time.perf_counter() - started


class Bench:
    """Measures variants of a recipe in this process."""

    def __init__(self, job: SpeedJob) -> None:
        self.job = job
        self.inputs = input_digests(job.recipe)
        self.world = World.initialize({}, job.recipe.run.device)
        self.default_threads = torch.get_num_threads()
        self.scratch = job.output / ".scratch"
        self.matmul: dict[tuple[int, str], float] = {}

    def measure(self, variant: str, settings: dict[str, Any], *, busy: bool = False) -> SpeedRow:
        """Measure the median step of the recipe with `settings`. If it runs out of GPU memory, return a row with `failure` set.

        `busy`: also measure the share of time in which the GPU runs a kernel.
        """
        running = self.start(variant, settings)
        if isinstance(running, SpeedRow):
            return running
        seconds: list[float] = []
        while len(seconds) < self.job.steps and (len(seconds) < 2 or sum(seconds) < self.job.max_variant_s):
            seconds.append(running.step())
        row = self.row(running, seconds)
        share = self.busy_share(running.trainer) if busy and self.world.device.type == "cuda" else None
        self.free()
        return row.model_copy(update={"gpu_busy": share})

    def start(self, variant: str, settings: dict[str, Any], kind: type[Trainer] = Trainer) -> "Running | SpeedRow":
        """Build and warm up a trainer of the recipe with `settings`. Out of memory, return a row with `failure` set instead."""
        row = SpeedRow(variant=variant, settings=settings, steps=0, load_average=os.getloadavg()[0])
        recipe = self._recipe(settings)
        try:
            if not recipe.run.threads:
                torch.set_num_threads(self.default_threads)
            trainer = kind(recipe, self.world, "speed", self.inputs, has_wandb_key=False)
            trainer.may_shrink = False  # out of memory is a result here
            trainer.go_to(None, trainer.state)
            reset_peak_memory(self.world.device)
            for _ in range(self.job.warmup_steps):
                trainer.step()
            trainer.clock = type(trainer.clock)()
            return Running(row, trainer, torch.get_num_threads(), peak_memory_gb(self.world.device))
        except torch.OutOfMemoryError:
            self.free()
            return row.model_copy(update={"failure": "out of memory"})

    def compare(self, first: "Running", second: "Running", pairs: int) -> tuple[Ratio, SpeedRow, SpeedRow]:
        """Interleave steps of both variants; return the second's speed relative to the first's, and the rows of both."""
        for running in (first, second):
            running.trainer.clock = type(running.trainer.clock)()
        seconds = alternate(first.step, second.step, pairs=pairs, max_s=2 * self.job.max_variant_s)
        return ratio_of(*seconds), self.row(first, seconds[0]), self.row(second, seconds[1])

    def row(self, running: "Running", seconds: list[float]) -> SpeedRow:
        """Build the row of a variant from the seconds of its latest steps."""
        trainer, clock, step_s = running.trainer, running.trainer.clock, statistics.median(seconds)
        per_s = 1 / (step_s * len(seconds))  # turns sums over the steps into rates at the median step time
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
        """Return the largest multiple of the recipe's micro-batch `own` whose step fits into GPU memory; None if none fits."""
        units = 16  # sizes are in sixteenths of `own`

        def scaled(size: int) -> MicroBatch:
            return MicroBatch(frames=max(1, own.frames * size // units), tokens=max(1, own.tokens * size // units))

        def fits(size: int) -> bool:
            running = self.start("", settings | {"run.micro_batch": scaled(size).model_dump()})
            self.free()
            return isinstance(running, Running)

        size = largest_that_fits(fits, units, most=units * self.job.most_batches)
        return None if size is None else scaled(size)

    def free(self) -> None:
        """Collect garbage and empty the CUDA cache."""
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def _recipe(self, settings: dict[str, Any]) -> Recipe:
        sweep = self.job.sweep
        tried = sum(max(4, len(getattr(sweep, name) or ())) for name in SWEPT)  # default lists have at most 4 values
        # a few more steps than needed, because the loader reads ahead
        steps = self.job.warmup_steps + self.job.steps + tried * self.job.sweep_steps + 16
        # `max_epochs` limits the recipe's own steps, not the benchmark's
        mixture = [part.model_copy(update={"max_epochs": None}).model_dump() for part in self.job.recipe.data.mixture]
        fixed = {
            "run.steps": steps,
            "run.budget_flops": None,
            "run.wandb": "disabled",
            "output": str(self.scratch),
            "data.mixture": mixture,
        }
        return self.job.recipe.with_changes(fixed | settings, where="the speed job's recipe")

    def _matmul_flops(self, precision: str) -> float:
        """FLOP/s of a large matrix product with the current number of threads, or on the GPU."""
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

    def busy_share(self, trainer: Trainer) -> float:
        """Share of time, over two steps, in which the GPU runs a kernel."""
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
