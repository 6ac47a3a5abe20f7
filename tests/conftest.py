"""Set before anything is imported: no test asks a hub, every test computes on one thread, CI tries the same examples every time. And a
Prefect server for the tests of a file."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

from infra.prefect_settings import without
from infra.stack import Stack
from infra.start import collect_rarely

# A failure in CI must be the change's, not the seed's; new examples are tried at every run elsewhere, and a failing one is printed as a
# line to paste (`@reproduce_failure`). HYPOTHESIS_PROFILE=ci or =local chooses by hand. No deadline: the machines are shared.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("local", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "local"))

collect_rarely()  # what tests import makes two million objects, and none is garbage


QUIETER = {"PREFECT_WORKER_QUERY_SECONDS": "5"}
"""Each look of a worker for work costs the server 30 ms of a core, which other tests could use."""

LONGEST = (
    *("e2e/test_pipeline", "infra/runpod/test_worker", "train/test_ends", "deployments/test_remote", "flows/test_register"),
    *("release/test_elsewhere", "e2e/test_helpers", "model/test_transformers_range", "train/test_lock", "train/test_divergence"),
    *("train/test_sharding", "train/test_resume", "train/test_exactness", "train/test_best", "e2e/test_stops", "e2e/test_ui"),
    *("flows/test_precompute", "release/test_release", "model/test_smollm2", "train/test_dpo", "tasks/test_phase_flow"),
    *("train/test_compile", "scaling/test_grid", "release/test_report", "scaling/test_confirm"),
)
"""Files that take half a minute and more, the longest first; but test_stops and test_ui when test_pipeline has made the volume that
they work on, four minutes after the start: before, they would only wait."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no process works alone at the end: test.sh gives each process a file at a time, in this order."""
    place = {Path(__file__).parent / f"{name}.py": number for number, name in enumerate(LONGEST)}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (place.get(item.path, len(LONGEST)), item.path not in slow))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A running server of an empty volume, without workers; of one file, because to start another costs what three idle minutes do."""
    stack = Stack(tmp_path_factory.mktemp("server") / "volume", environment=without(os.environ) | QUIETER)
    try:
        stack.start_server()
        stack.wait_for_server()
        yield stack
    finally:
        forget_server()
        stack.stop()


@pytest.fixture
def prefect_api(stack: Stack) -> Iterator[Stack]:
    """The server, and Prefect's clients in this process know it."""
    with known_to_clients(stack):
        yield stack


@pytest.fixture(scope="module", autouse=True)
def forget_servers() -> Iterator[None]:
    """Each file of tests starts anew."""
    yield
    forget_server()


@pytest.fixture(scope="module", autouse=True)
def scheduling_checked() -> Iterator[None]:
    """A library may make this process real-time; it and what it starts would then starve all others, whose tests fail for want of time."""
    yield
    assert os.sched_getscheduler(0) == os.SCHED_OTHER, "a test of this file left the process with real-time scheduling"


def forget_server() -> None:
    """Prefect sends a process's events through a client of the server that the first of them went to: that client ends here."""
    if "prefect.events.worker" in sys.modules:
        from prefect.events.worker import EventsWorker

        EventsWorker.drain_all(timeout=5)


@contextmanager
def known_to_clients(stack: Stack) -> Iterator[None]:
    """Prefect's clients in this process know the server."""
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE, temporary_settings

    known = stack.client_environment()
    settings = {
        PREFECT_API_URL: known["PREFECT_API_URL"],
        PREFECT_API_AUTH_STRING: known["PREFECT_API_AUTH_STRING"],
        PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False,
    }
    with temporary_settings(settings):
        yield
