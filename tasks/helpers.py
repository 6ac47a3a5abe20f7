"""A phase of many independent steps on several workers: more runs of its deployment, each makes what nobody else is making.

A step's lock decides who makes it, so helpers need not know of each other. One that dies loses nothing but its own time; where no worker
takes one, the phase's own run makes everything.
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
from tasks.make import BusyError, How, Reporter, make
from tasks.steps import Step


@contextmanager
def helped(phase: str, config: PipelineConfig, volume: str, count: int) -> Generator[None]:
    """While in the block, `count` more runs of the phase's deployment make steps of it; those that still run are cancelled at its end."""
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
                    # nobody would end one that no worker has taken
                    waits = state.is_scheduled()
                    client.set_flow_run_state(run.id, (Cancelled if waits else Cancelling)(message="its phase's run has ended"))


def share(
    steps: Sequence[Step],
    volume: Path,
    how: How,
    *,
    number: int,
    of: int,
    at_once: int,
    stop: threading.Event,
    reporter: Reporter,
) -> list[str]:
    """Make those of independent steps that are missing and that nobody else makes now; returns their names.

    Run `number` of `of` begins at its own part of the list and goes round. A step that fails is left to the phase's own run, which tries
    it again and reports it.
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
            log.warning("%s failed here, and is left to the phase's own run: %s", step.name, error)
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
