"""The stack dies while the main thread waits for an answer of Prefect's client, which would try again for half an hour."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from infra.stack import Stack, StackError, StackState
from infra.watchdog import watched
from tests.infra import __path__ as here

LIMIT_S = 10


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """With a server that answers nothing but that it is healthy."""
    with subprocess.Popen([sys.executable, Path(here[0]) / "tiny_server.py"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        stack = Stack(tmp_path, environment={})
        stack.state = StackState(f"{url}/api", url, True, {"server": server.pid})
        stack.children["server"] = server
        with temporary_settings({PREFECT_API_URL: f"{url}/api", PREFECT_CLIENT_MAX_RETRIES: 10}):
            yield stack
        server.kill()


def ask() -> None:
    with get_client(sync_client=True) as client:
        client.read_flows()


async def ask_async() -> None:
    async with get_client() as client:
        await client.read_flows()


def register() -> None:
    asyncio.run(ask_async())


@pytest.mark.parametrize("waits", [ask, register])
@pytest.mark.parametrize(("number", "words"), [(signal.SIGKILL, "ended .status -9"), (signal.SIGSTOP, "was stopped by a signal")])
def test_it_is_reported_within_ten_seconds(stack: Stack, waits: Callable[[], None], number: int, words: str) -> None:
    server = stack.children["server"]
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -{number} {server.pid}"])
    began = time.monotonic()
    with pytest.raises(StackError, match=f"the Prefect server {words}"), watched(stack, lambda _: None):
        waits()
    assert time.monotonic() - began < 0.5 + LIMIT_S


def test_a_server_that_is_silent_is_reported_and_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.watchdog.REPORTED_S", 1.0)
    stack, said = Stack(tmp_path, environment={}), []
    stack.state = StackState("http://127.0.0.1:9/api", "http://127.0.0.1:9", False, {})
    began = time.monotonic()
    with pytest.raises(StackError, match="has not answered for"), watched(stack, said.append, given_up_s=2):
        time.sleep(60)
    assert time.monotonic() - began < 2 + LIMIT_S
    assert said == ["the Prefect server at http://127.0.0.1:9/api does not answer; waiting for it"]


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """A worker of a parallel test run ignores Ctrl-C, which is its controller's."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
def test_the_user_s_own_interrupt_stays_one(stack: Stack) -> None:
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), watched(stack, lambda _: None):
        time.sleep(5)


def test_nothing_happens_while_all_is_well(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.watchdog.POLL_S", 0.2)
    with watched(stack, lambda _: None):
        time.sleep(0.7)
