"""Trigger, follow and cancel a pipeline run from outside."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled, Cancelling
from rich.console import Console

from deployments.display import Display
from flows.registry import PHASES
from infra.processes import end_marked
from tasks.config import PipelineConfig
from tasks.status import PhaseStatus

POLL_S = 2.0
"""Polling interval; each poll costs the server 20 ms of CPU time."""
CANCEL_S = 90.0
"""How long a run may be Cancelling. Prefect's worker gives the run's process 30 s, and loads the flow for its hooks. After that, the
worker must have missed the cancellation: it learns of it from a single event, which can get lost."""
RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"
"""Environment variable of a flow run's processes."""
TASK_RUNS = 200
"""Task runs to read per request; a pipeline run has two per phase."""
UNSETTLED = {"Pending", "Running", "Retrying"}
"""Names of the states of an unfinished task."""
SETTLE_S = 10.0
"""How long to wait for the phases' final states after the run has ended: Prefect's server gets task states later, from events."""


def trigger(config: PipelineConfig, flow: str, name: str) -> UUID:
    """Create a run of the deployment `name` of the pipeline or of a phase; returns its id."""
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(f"{flow}/{name}")
        return client.create_flow_run_from_deployment(deployment.id, name=f"{config.name} · {flow}").id


def follow(
    run: UUID,
    config: PipelineConfig,
    volume: Path,
    console: Console,
    only: str | None,
    *,
    begun: Callable[[], None] = lambda: None,
    cancel_s: float = CANCEL_S,
) -> State[Any]:
    """Show the run until it ends; returns its final state. `only` names the phase if the run is of a single phase.

    `begun` is called repeatedly while the run is running. A run that has been Cancelling for `cancel_s` seconds is ended from here.
    """
    began, cancelling_since, ended_at = time.time(), None, None
    folders = {name: phase.folder(config, volume) for name, phase in PHASES.items()}
    with get_client(sync_client=True) as client, Display(console) as display:
        while True:
            try:
                flow_run = client.read_flow_run(run)
                ended = flow_run.state.name if flow_run.state else None
                states = {only: ended or ""} if only else _phase_states(client, run)
            except httpx.TransportError:  # the watchdog reports it if the server has died
                time.sleep(POLL_S)
                continue
            if flow_run.state is not None and flow_run.state.is_running():
                begun()
            for name, folder in folders.items():
                # a task run has another name until it starts, so keep the last known state until there is a newer one
                state = states.get(name, display.phases[name].state)
                display.show(name, state, PhaseStatus.read(folder, since=began))
            if flow_run.state is not None and flow_run.state.is_final():
                ended_at = ended_at or time.monotonic()
                settled = states.keys() >= PHASES.keys() and not UNSETTLED & {*states.values()}
                if only or settled or not flow_run.state.is_completed() or time.monotonic() - ended_at > SETTLE_S:
                    return flow_run.state
            if flow_run.state is not None and flow_run.state.type is StateType.CANCELLING:
                cancelling_since = cancelling_since or time.monotonic()
                if time.monotonic() - cancelling_since > cancel_s:
                    _end(client, _unfinished(client, run), f"cancelled, and not ended by its worker within {cancel_s:.0f} s")
            time.sleep(POLL_S)


def cancel(run: UUID, *, timeout_s: float) -> None:
    """Cancel the run and its phases, and wait for them; runs that have not ended after `timeout_s` are ended from here."""
    with get_client(sync_client=True) as client:
        deadline = time.monotonic() + timeout_s
        for one in _unfinished(client, run):
            client.set_flow_run_state(one.id, Cancelling(message="interrupted"))
        while (left := _unfinished(client, run)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        _end(client, left, "interrupted")


def _end(client: SyncPrefectClient, runs: list[FlowRun], reason: str) -> None:
    """Kill the runs' processes on this host, and mark the runs Cancelled."""
    for run in runs:
        end_marked(RUN_VARIABLE, str(run.id))
        client.set_flow_run_state(run.id, Cancelled(message=reason), force=True)


def _phase_states(client: SyncPrefectClient, run: UUID) -> dict[str, str]:
    """The state of each phase's task in the pipeline run."""
    tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])), limit=TASK_RUNS)
    return {task.name: task.state.name or "" for task in tasks if task.name in PHASES and task.state}


def _unfinished(client: SyncPrefectClient, run: UUID) -> list[FlowRun]:
    """The pipeline run and its phases' runs that have not ended."""
    children = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run])))
    return [one for one in (client.read_flow_run(run), *children) if not (one.state and one.state.is_final())]
