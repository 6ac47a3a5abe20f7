"""The local stack's care for what it starts: marks, locks, ports, and what is left of an earlier one."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.processes import STACK_VARIABLE, end_marked, mark, marked
from infra.stack import PortTakenError, Stack, StackError, StackState, free_port, port_is_free

OUTSIDE = {"PATH": os.environ["PATH"], "PREFECT_API_URL": "http://elsewhere:4200/api", "PREFECT_API_KEY": "key"}
INSIDE = {"PATH": os.environ["PATH"], "PREFECT_PROFILE": "mine", "PREFECT_HOME": "/home/me/.prefect"}


@contextmanager
def sleeper(**environment: str) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=os.environ | environment)
    try:
        while environment and not list(marked(*next(iter(environment.items())))):  # until it shows its own environment
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


def test_what_a_killed_stack_left_is_ended_and_nothing_else(tmp_path: Path) -> None:
    mine, other = {STACK_VARIABLE: mark(tmp_path)}, {STACK_VARIABLE: mark(tmp_path / "other")}
    with sleeper(**mine) as leftover, sleeper(**other) as of_another_volume, sleeper() as of_no_volume:
        Stack(tmp_path, environment=OUTSIDE).start_server()
        assert leftover.wait(10) is not None
        assert of_another_volume.poll() is None
        assert of_no_volume.poll() is None


def test_processes_that_ignore_sigterm_are_ended_too(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('ready', 'w'); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {STACK_VARIABLE: "stubborn"}, cwd=tmp_path)
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    assert end_marked(STACK_VARIABLE, "stubborn", grace_s=0.3) == 1
    process.wait(10)


def test_one_command_at_a_time_uses_a_volume(tmp_path: Path) -> None:
    first = Stack(tmp_path, environment=OUTSIDE)
    first.start_server()
    with pytest.raises(StackError, match="another fvlm command"):
        Stack(tmp_path, environment=OUTSIDE).start_server()
    first.stop()
    Stack(tmp_path, environment=OUTSIDE).start_server()


def test_a_server_of_the_user_is_used_with_the_user_s_key_and_none_is_started(tmp_path: Path) -> None:
    stack = Stack(tmp_path, environment=OUTSIDE)
    assert stack.start_server() == "http://elsewhere:4200"
    assert stack.children == {}
    given = stack.environment()
    assert (given["PREFECT_API_URL"], given["PREFECT_API_KEY"]) == (OUTSIDE["PREFECT_API_URL"], "key")
    assert STACK_VARIABLE not in stack.client_environment()


def test_our_own_server_sees_nothing_of_the_user_s_prefect_settings(tmp_path: Path) -> None:
    stack = Stack(tmp_path, environment=INSIDE)
    stack.state = StackState("http://127.0.0.1:4200/api", "http://127.0.0.1:4200", True, {})
    given = stack.environment()
    assert "PREFECT_PROFILE" not in given
    assert given["PREFECT_HOME"] == str(tmp_path / "prefect")
    assert given["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert given[STACK_VARIABLE] == mark(tmp_path)


def test_a_taken_port_is_refused_and_another_one_is_found(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not port_is_free(port)
        stack = Stack(tmp_path, environment=INSIDE)
        with pytest.raises(PortTakenError, match=f"port {port} is taken"):
            stack.start_server(port)
        assert stack.state is None
        with pytest.raises(PortTakenError):
            Stack(tmp_path, environment=INSIDE).start_server(port)  # and not: another command is running
    assert port_is_free(free_port())


def test_a_port_that_an_earlier_command_s_leftover_holds_is_ours(tmp_path: Path) -> None:
    code = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); time.sleep(60)"
    environment = {**os.environ, STACK_VARIABLE: mark(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as leftover:
        assert leftover.stdout is not None
        port = int(leftover.stdout.readline())
        stack = Stack(tmp_path, environment=INSIDE)
        try:
            assert stack.start_server(port) == f"http://127.0.0.1:{port}"
            assert leftover.wait(10) is not None
        finally:
            stack.stop()


def test_a_part_that_died_is_noticed_with_its_log_and_what_to_do(tmp_path: Path) -> None:
    stack = Stack(tmp_path, environment=OUTSIDE)
    stack.start_server()
    (stack.home / "fvlm-gpu.log").write_text("")
    with sleeper() as worker:
        assert stack.state is not None
        stack.children["fvlm-gpu"] = worker
        stack.state.processes["fvlm-gpu"] = worker.pid
        stack.check()
        worker.kill()
        worker.wait()
        with pytest.raises(StackError, match=r"worker of fvlm-gpu ended \(status -9\).*fvlm-gpu\.log") as caught:
            stack.check()
    assert "same command again" in str(caught.value)


def test_a_stack_that_was_left_but_died_is_not_taken_over(tmp_path: Path) -> None:
    stack = Stack(tmp_path, environment=OUTSIDE)
    stack.start_server()
    stack.leave_running()
    assert stack.kept() is None, "nothing of it runs"
