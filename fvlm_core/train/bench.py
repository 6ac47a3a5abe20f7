"""Measures variants of one recipe in this process: trainers of the real step on the real data, warmed up and run in turn (see `race`)."""

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
from fvlm_core.train.race import Ratio, alternate, largest_that_fits, ratio_of

MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
"""Large enough to be compute-bound, small enough to take no time."""
MATMUL_REPEATS = 5


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
        share = self.busy_share(running.trainer) if busy and self.world.device.type == "cuda" else None
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
        sweep = self.job.sweep
        tried = sum(max(4, len(getattr(sweep, name) or ())) for name in SWEPT)  # without a list of its own a setting has at most 4
        # the loader reads ahead: a few more steps than are taken
        steps = self.job.warmup_steps + self.job.steps + tried * self.job.sweep_steps + 16
        # how often a run may go through a source is said of the recipe's own steps
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

    def busy_share(self, trainer: Trainer) -> float:
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
