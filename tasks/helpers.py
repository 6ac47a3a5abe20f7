"""Runs the independent steps of a phase on several workers: helper runs of its deployment make steps that no other run is making.

A step's lock decides which run makes it, so helpers need not know of each other. A helper that dies only loses its own work; if no worker
takes a helper run, the phase's own run makes everything.
"""

import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.runtime import deployment
from prefect.states import Cancelled, Cancelling

from infra.launch import JobStoppedError
from tasks.config import PipelineConfig
from tasks.make import BusyError, MakeOptions, Reporter, make
from tasks.steps import Step


@contextmanager
def helped(phase: str, config: PipelineConfig, volume: str, count: int) -> Generator[None]:
    """During the block, `count` helper runs of the phase's deployment make steps of it. Runs that are left at its end are cancelled."""
    if not count or not deployment.name:
        yield
        return
    runs = [
        cast(
            FlowRun,
            run_deployment(
                f"{phase}/{deployment.name}",
                parameters={"config": config.model_dump(mode="json"), "volume": volume, "helper": number},
                flow_run_name=f"{config.name} · {phase} · helper {number}",
                timeout=0,
            ),
        )
        for number in range(1, count + 1)
    ]
    try:
        yield
    finally:
        with get_client(sync_client=True) as client:
            for run in runs:
                state = client.read_flow_run(run.id).state
                if state and not state.is_final():
                    # a run that no worker has taken would stay in Cancelling
                    waits = state.is_scheduled()
                    client.set_flow_run_state(run.id, (Cancelled if waits else Cancelling)(message="its phase's run has ended"))


def share(
    steps: Sequence[Step],
    volume: Path,
    how: MakeOptions,
    *,
    number: int,
    of: int,
    at_once: int,
    stop: threading.Event,
    reporter: Reporter,
) -> list[str]:
    """Make those of the independent steps that are missing and that no other run is making. Returns their names.

    Run `number` of `of` starts at its own part of the list and wraps around. A step that fails is left to the phase's own run, which
    retries it and reports the failure.
    """
    first = len(steps) * number // of
    log = get_run_logger()

    def one(step: Step) -> str | None:
        if step.find(volume, how.verify, how.on_code_change).made:
            return None
        try:
            make(step, volume, how=how, stop=stop, reporter=reporter, wait=False)
        except BusyError:
            return None
        except (JobStoppedError, InterruptedError):
            raise
        except Exception as error:
            log.warning("%s failed here and is left to the phase's own run: %s", step.name, error)
            reporter.ended(step.name, succeeded=False)
            return None
        reporter.ended(step.name, succeeded=True)
        return step.name

    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(one, step) for step in (*steps[first:], *steps[:first])]
        try:
            return [name for future in futures if (name := future.result())]
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
