"""Waits for a flow run of a deployment, and notices when nobody is left who could bring it to its end."""

import time
from datetime import datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.states import Crashed

POLL_S = 1.0
"""Between looks at the run's state; each costs the server 30 ms of a core, which its jobs could use."""
LOOK_S = 10.0
"""Between looks at signs of life; they cost the server more."""
UNPOLLED_S = 120.0
"""Silence of a work queue's workers. They ask for work every two seconds (every ten by Prefect's default), and the server itself calls a
queue not ready after 60; twice that allows for a machine that is very busy, or for a worker that is being started anew."""
MISSED_HEARTBEATS = 5
"""In a row, of a running flow run. One gets lost with its connection or comes late; of five, with the default of 30 s two and a half
minutes, the process or its host is gone."""
HEARTBEAT = "prefect.flow-run.heartbeat"


class LostRunError(RuntimeError):
    """Nobody is left who could bring the flow run to its end; it has been marked Crashed."""


def wait_for_run(
    client: SyncPrefectClient,
    run: UUID,
    *,
    unpolled_s: float = UNPOLLED_S,
    silent_s: float | None = None,
    poll_s: float = POLL_S,
    look_s: float = LOOK_S,
) -> State[Any]:
    """Wait until the flow run has ended; returns its last state, of whatever type.

    A run that is to start may wait as long as a worker asks its queue for work, or the queue or its pool are paused: for its turn
    on a GPU, say. One that runs may take as long as it sends heartbeats; `silent_s` is how long it may send none (default:
    MISSED_HEARTBEATS of this process's own interval; no limit where the user has turned heartbeats off). A paused run may wait for ever.

    Raises LostRunError: the run was deleted, no worker has asked for it for `unpolled_s`, or its process has fallen silent.
    """
    interval = get_current_settings().flows.heartbeat_frequency
    if silent_s is None and interval is not None:
        silent_s = MISSED_HEARTBEATS * interval
    sign, seen, looked = None, time.monotonic(), 0.0
    while True:
        try:
            found = client.read_flow_run(run)
        except ObjectNotFound as error:
            raise LostRunError(f"the flow run {run} was deleted") from error
        if found.state is not None and found.state.is_final():
            return found.state
        now = time.monotonic()
        if now - looked >= look_s:
            looked = now
            new = (found.state and found.state.id, _sign_of_life(client, found))
            if new != sign or _may_wait(client, found):
                sign, seen = new, now
            running = _runs(found)
            limit = silent_s if running else unpolled_s
            if limit is not None and now - seen > limit:
                _give_up(client, found, now - seen, running=running)
        time.sleep(poll_s)


def _runs(run: FlowRun) -> bool:
    """Whether a process of its own works on it."""
    return run.state is not None and run.state.type in (StateType.RUNNING, StateType.CANCELLING)


def _sign_of_life(client: SyncPrefectClient, run: FlowRun) -> datetime | None:
    """The newest heartbeat of a run that runs, else the last time that a worker asked its queue for work.

    Only compared with an earlier one: clocks of other hosts may be wrong.
    """
    if _runs(run):
        wanted = EventFilter(
            event=EventNameFilter(name=[HEARTBEAT]),
            resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]),
        )
        newest = client.read_events(filter=wanted, limit=1).events
        return newest[0].occurred if newest else None
    if run.work_queue_id is None:
        return None
    return client.read_work_queue(run.work_queue_id).last_polled


def _may_wait(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether somebody has stopped the run, its queue or its pool on purpose, or it is for no worker at all."""
    if _runs(run):
        return False
    if run.state is not None and run.state.is_paused():
        return True
    if run.work_queue_id is None or run.work_pool_name is None:
        return True
    return client.read_work_queue(run.work_queue_id).is_paused or bool(client.read_work_pool(run.work_pool_name).is_paused)


def _give_up(client: SyncPrefectClient, run: FlowRun, silence_s: float, *, running: bool) -> None:
    """Mark the run Crashed, so that nobody else waits for it, and raise LostRunError."""
    if running:
        reason = f"its process has not been heard of for {silence_s:.0f} s"
    else:
        reason = f"no worker has asked the queue {run.work_queue_name} of the pool {run.work_pool_name} for work for {silence_s:.0f} s"
    client.set_flow_run_state(run.id, Crashed(message=f"lost: {reason}"), force=True)
    raise LostRunError(f"the flow run {run.name} is lost: {reason}; start its worker, or the command that keeps it, again")
