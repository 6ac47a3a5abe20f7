"""Phase 1: training speed, naive and tuned, and the choice of the fastest settings."""

import os

from flows.precompute import PRECOMPUTE, training_inputs
from fvlm_core.experiments import Experiment
from fvlm_core.tables import Table
from fvlm_core.train.jobs import SpeedReport
from tasks.config import PipelineConfig
from tasks.phase import Changes, EarlierResults, Phase, Results, Shown
from tasks.phase_flow import flow_on_demand
from tasks.recipes import base_recipe
from tasks.steps import Step

REPORT = "speed-report"
COLUMNS = {
    "variant",
    "steps",
    "step_s",
    "step_s_low",
    "step_s_high",
    "over",
    "gain",
    "gain_low",
    "gain_high",
    "samples_per_s",
    "gflops_per_s",
}
COLUMNS |= {"mfu", "gpu_busy", "power_w", "sm_clock_mhz", "peak_memory_gb", "data_wait_share"}


def steps(config: PipelineConfig, before: EarlierResults) -> list[Step]:
    recipe = base_recipe(config.model, config.base, "base", "speed", before.changes)
    inputs = training_inputs(before, "recipe.")
    threads = os.cpu_count() or 1
    return [Step.of(REPORT, "fvlm_core.train.speed", config.speed, inputs=inputs, threads=threads, recipe=recipe.model_dump(mode="json"))]


def decide(config: PipelineConfig, results: Results) -> Changes:
    """The fastest settings that were measured."""
    return SpeedReport.read(results.folder(REPORT)).chosen


def show(config: PipelineConfig, results: Results) -> Shown:
    report = SpeedReport.read(results.folder(REPORT))
    chosen = ", ".join(f"`{path}` = `{value}`" for path, value in report.chosen.items())
    advice = (
        f"A checkpoint takes {report.checkpoint.write_s:.1f} s to write: every {report.checkpoint.steps:,} steps would lose the least time."
    )
    return Shown(
        table=Table.of([row.model_dump(mode="json", include=COLUMNS) for row in report.rows]),
        text=f"{report.summary()} Chosen: {chosen}. {advice}",
        figures=results.figures(REPORT, SpeedReport),
    )


def learn(config: PipelineConfig, results: Results) -> list[Experiment]:
    report = SpeedReport.read(results.folder(REPORT))
    entries = []
    for row in report.rows:
        if not row.over and not row.failure:
            continue
        low, high = row.gain_low or 0.0, row.gain_high
        interval = f"[{low:.2f}, {'' if high is None else f'{high:.2f}'}]"
        entries.append(
            Experiment(
                run=row.variant,
                hypothesis=f"faster than {row.over or 'without'}",
                change=", ".join(f"{path} = {value}" for path, value in row.settings.items()) if row.variant == "tuned" else row.variant,
                result=row.failure or f"{row.gain or 0:.2f}x {interval}, n={row.pairs} pairs of steps",
                verdict="failed" if row.failure else "faster" if low > 1 else "slower" if high is not None and high < 1 else "no gain",
            )
        )
    return entries


SPEED = Phase(
    name="speed",
    purpose="Measure the base recipe naive and tuned, one setting after another, and choose the fastest.",
    pool="gpu",
    after=(PRECOMPUTE,),
    reads=("model", "base", "speed"),
    steps=steps,
    decide=decide,
    show=show,
    learn=learn,
)
__getattr__ = flow_on_demand(SPEED, __name__)
