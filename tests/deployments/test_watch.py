"""A pipeline run followed on a real server."""

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.states import Cancelling, Running
from rich.console import Console

from deployments import watch
from infra.stack import Stack
from tasks.config import PipelineConfig
from tests.tiny import profile_values


@flow
def nothing() -> None:
    """Never run; its run is moved by hand."""


@pytest.fixture
def client(prefect_api: Stack) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


def test_a_cancelled_run_that_its_worker_never_ends_is_ended(client: SyncPrefectClient, tmp_path: Path) -> None:
    deployment = client.create_deployment(client.create_flow(nothing), f"watched-{uuid.uuid4().hex[:6]}")
    run = client.create_flow_run_from_deployment(deployment).id
    process = subprocess.Popen(["sleep", "600"], env=os.environ | {watch.RUN_VARIABLE: str(run)})
    try:
        for state in (Running(), Cancelling()):
            client.set_flow_run_state(run, state, force=True)
        config = PipelineConfig.from_values(profile_values(), where="the tests' profile")
        state = watch.follow(run, config, tmp_path, Console(quiet=True), None, cancel_s=0.0)
        assert state.is_cancelled()
        assert "not ended by its worker" in (state.message or "")
        assert process.poll() is not None, "the run's process has ended"
    finally:
        process.kill()
