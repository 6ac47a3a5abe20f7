"""Waits for a flow run of a deployment, and detects that nothing is left that could finish it."""

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
"""Interval between polls of the run's state; each costs 30 ms of CPU time on the server, which jobs could use."""
LOOK_S = 10.0
"""Interval between checks for signs of life, which cost the server more."""
UNPOLLED_S = 120.0
"""Time without a poll of the work queue after which a waiting run is lost. Workers poll every two seconds (every ten by Prefect's default),
and the server itself calls a queue not ready after 60; twice that allows for a very busy machine, or for a worker that is restarting."""
MISSED_HEARTBEATS = 5
"""Consecutive missed heartbeats after which a running flow run is lost. A single one may be late or lost with its connection; after five,
two and a half minutes with the default of 30 s, the process or its host is gone."""
HEARTBEAT = "prefect.flow-run.heartbeat"


class LostRunError(RuntimeError):
    """Nothing is left that could finish the flow run. It has been marked Crashed, or was deleted."""


def wait_for_run(
    client: SyncPrefectClient,
    run: UUID,
    *,
    unpolled_s: float = UNPOLLED_S,
    silent_s: float | None = None,
    poll_s: float = POLL_S,
    look_s: float = LOOK_S,
) -> State[Any]:
    """Wait until the flow run has ended, and return its last state, of whatever type.

    A run that has not started may wait, e.g. for a GPU, as long as workers poll its queue, or while the queue or its pool is paused. A
    running one may take as long as it sends heartbeats; `silent_s` is how long it may send none (default: MISSED_HEARTBEATS times this
    process's own interval; no limit if the user has turned heartbeats off). A paused run may wait forever.

    Raises LostRunError if the run was deleted, no worker has polled its queue for `unpolled_s` seconds, or its process is silent.
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
    """Return whether a process is executing the run."""
    return run.state is not None and run.state.type in (StateType.RUNNING, StateType.CANCELLING)


def _sign_of_life(client: SyncPrefectClient, run: FlowRun) -> datetime | None:
    """Return the newest heartbeat of a run that is running, otherwise the last poll of its queue.

    It is only compared with an earlier one, because the clocks of other hosts may be wrong.
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
    """Return whether the run, its queue or its pool was paused on purpose, or the run needs no worker."""
    if _runs(run):
        return False
    if run.state is not None and run.state.is_paused():
        return True
    if run.work_queue_id is None or run.work_pool_name is None:
        return True
    return client.read_work_queue(run.work_queue_id).is_paused or bool(client.read_work_pool(run.work_pool_name).is_paused)


def _give_up(client: SyncPrefectClient, run: FlowRun, silence_s: float, *, running: bool) -> None:
    """Mark the run Crashed, so that nothing else waits for it, and raise LostRunError."""
    if running:
        reason = f"its process has not been heard of for {silence_s:.0f} s"
    else:
        reason = f"no worker has asked the queue {run.work_queue_name} of the pool {run.work_pool_name} for work for {silence_s:.0f} s"
    client.set_flow_run_state(run.id, Crashed(message=f"lost: {reason}"), force=True)
    raise LostRunError(f"the flow run {run.name} is lost: {reason}; start its worker, or the command that keeps it, again")
