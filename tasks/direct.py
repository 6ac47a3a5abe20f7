"""Runs phases without Prefect, in this process: the same steps and jobs, without a server, caching of task runs or retries."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tasks.config import PipelineConfig
from tasks.make import How, make
from tasks.phase import Before, Changes, Phase, Results
from tasks.steps import Made, Step, in_waves


def run_directly(phases: Sequence[Phase], config: PipelineConfig, volume: Path) -> dict[str, dict[str, Made]]:
    """Make every step of the phases, in order; returns the results by phase and step."""
    done: dict[str, dict[str, Made]] = {}
    decided: dict[str, Changes] = {}
    folders = {phase.name: phase.folder(config, volume) for phase in phases}
    for phase in phases:
        phase.prepare(config, volume)
    how = How(verify=config.machine.verify, on_code_change=config.machine.on_code_change)
    with ThreadPoolExecutor(config.machine.parallel_jobs) as pool:
        for phase in phases:
            made: dict[str, Made] = {}
            for wave in in_waves(phase.steps(config, Before(volume, done, decided, folders))):
                bound: list[Step] = [step.bound(made) for step in wave]
                made |= dict(zip((step.name for step in bound), pool.map(lambda step: make(step, volume, how=how), bound), strict=True))
            done[phase.name] = made
            decided[phase.name] = phase.decide(config, Results(volume, made))
    return done
