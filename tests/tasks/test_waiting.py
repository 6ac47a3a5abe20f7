"""Waiting for flow runs on a real server: of those that end, those that wait for a turn, and those that nobody works on any more."""

import threading
import time
import uuid
from collections.abc import Iterator
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.events import emit_event
from prefect.states import Completed, Paused, Running

from infra.stack import Stack
from tasks.waiting import HEARTBEAT, LostRunError, wait_for_run

QUICK = {"poll_s": 0.05, "look_s": 0.2}


@flow
def nothing() -> None:
    """Never run; its runs are moved by hand."""


@pytest.fixture
def client(prefect_api: Stack) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


def new_run(client: SyncPrefectClient) -> UUID:
    """A run in the queue of a pool that no worker serves."""
    name = f"pool-{uuid.uuid4().hex[:6]}"
    client.create_work_pool(WorkPoolCreate(name=name, type="process"))
    flow_id = client.create_flow(nothing)
    deployment = client.create_deployment(flow_id, name, work_pool_name=name, work_queue_name="mine")
    return client.create_flow_run_from_deployment(deployment).id


def test_the_last_state_of_a_run_that_ends(client: SyncPrefectClient) -> None:
    run = new_run(client)
    timer = threading.Timer(0.5, lambda: end(client, run))
    timer.start()
    assert wait_for_run(client, run, unpolled_s=30, **QUICK).is_completed()
    timer.join()


def end(client: SyncPrefectClient, run: UUID) -> None:
    client.set_flow_run_state(run, Completed(), force=True)


def test_a_run_that_no_worker_asks_for_is_lost(client: SyncPrefectClient) -> None:
    run = new_run(client)
    with pytest.raises(LostRunError, match="no worker has asked the queue mine of the pool pool-"):
        wait_for_run(client, run, unpolled_s=1, **QUICK)
    state = client.read_flow_run(run).state
    assert state is not None
    assert state.is_crashed(), "nobody else waits for it"


def test_a_run_may_wait_while_its_queue_or_itself_is_paused(client: SyncPrefectClient) -> None:
    run = new_run(client)
    queue = client.read_flow_run(run).work_queue_id
    assert queue is not None
    client.update_work_queue(queue, is_paused=True)
    still_waits(client, run)
    client.update_work_queue(queue, is_paused=False)
    paused = new_run(client)
    client.set_flow_run_state(paused, Paused(timeout_seconds=600), force=True)
    still_waits(client, paused)


def still_waits(client: SyncPrefectClient, run: UUID) -> None:
    """For several times as long as a silent one would."""
    timer = threading.Timer(2.5, lambda: end(client, run))
    timer.start()
    began = time.monotonic()
    assert wait_for_run(client, run, unpolled_s=0.5, silent_s=0.5, **QUICK).is_completed()
    assert time.monotonic() - began > 2
    timer.join()


def test_a_running_run_without_heartbeats_is_lost_and_one_with_them_is_not(client: SyncPrefectClient, prefect_api: Stack) -> None:
    run = new_run(client)
    client.set_flow_run_state(run, Running(), force=True)
    emit_event(event=HEARTBEAT, resource={"prefect.resource.id": f"prefect.flow-run.{run}"})
    began = time.monotonic()
    with pytest.raises(LostRunError, match="its process has not been heard of"):
        wait_for_run(client, run, silent_s=3, **QUICK)
    assert time.monotonic() - began > 3


def test_a_deleted_run_is_lost(client: SyncPrefectClient) -> None:
    run = new_run(client)
    client.delete_flow_run(run)
    with pytest.raises(LostRunError, match="deleted"):
        wait_for_run(client, run, **QUICK)
