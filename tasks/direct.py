"""Runs phases in this process, without Prefect: the same steps, jobs and manifests, but no server, no task-run cache and no retries."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from tasks.config import PipelineConfig
from tasks.make import MakeOptions, make
from tasks.phase import Phase, PhaseManifest, Results, conclude, earlier_results
from tasks.steps import Step, StepResult, in_dependency_order


def run_directly(phases: Sequence[Phase], config: PipelineConfig, volume: Path) -> dict[str, PhaseManifest]:
    """Make every step of the phases, in order; returns the phases' manifests by name."""
    done: dict[str, PhaseManifest] = {}
    for phase in phases:
        phase.prepare(config, volume)
    with closing(MakeOptions.of(config.machine)) as how, ThreadPoolExecutor(config.machine.parallel_jobs) as pool:
        for phase in phases:
            started, made = time.monotonic(), dict[str, StepResult]()
            for wave in in_dependency_order(phase.steps(config, earlier_results(phase, config, volume, done))):
                bound: list[Step] = [step.bound(made) for step in wave]
                made |= dict(zip((step.name for step in bound), pool.map(lambda step: make(step, volume, how=how), bound), strict=True))
            done[phase.name] = conclude(phase, config, Results(volume, made), done, seconds=time.monotonic() - started)
    return done
