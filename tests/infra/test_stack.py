"""The local stack's care for what it starts: marks, locks, ports, and what is left of an earlier one."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from infra import guard
from infra.api import credentials
from infra.ports import listen, listen_on_free
from infra.processes import STACK_VARIABLE, end_marked, marked
from infra.stack import REPOSITORY, Stack, StackError, StackRefusedError, StackState, require_access, stop_command
from infra.volume import volume_id

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
    mine, other = {STACK_VARIABLE: volume_id(tmp_path)}, {STACK_VARIABLE: volume_id(tmp_path / "other")}
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


def test_our_own_server_has_its_home_on_the_volume_and_a_password(tmp_path: Path) -> None:
    stack = Stack(tmp_path, environment=INSIDE)
    stack.state = StackState("http://127.0.0.1:4200/api", "http://127.0.0.1:4200", True, {})
    given = stack.environment()
    assert "PREFECT_PROFILE" not in given
    assert given["PREFECT_HOME"] == str(tmp_path / "prefect")
    assert given["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert given["PREFECT_SERVER_API_AUTH_STRING"] == given["PREFECT_API_AUTH_STRING"] == stack.password_file.read_text()
    assert given["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == "http://127.0.0.1:4200,http://localhost:4200"
    assert given[STACK_VARIABLE] == volume_id(tmp_path)


def test_a_taken_port_is_refused_and_another_one_is_found(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        stack = Stack(tmp_path, environment=INSIDE)
        with pytest.raises(StackRefusedError, match=f"port {port} cannot be used: it is taken"):
            stack.start_server(port)
        assert stack.state is None
        with pytest.raises(StackRefusedError):
            Stack(tmp_path, environment=INSIDE).start_server(port)  # and not: another command is running
    with listen_on_free() or pytest.fail("no port is free") as first, listen_on_free() or pytest.fail("only one is") as second:
        assert first.getsockname() != second.getsockname(), "taken at once, not when a server has started"


@pytest.mark.parametrize("port", [0, -1, 99999])
def test_there_is_no_such_port(tmp_path: Path, port: int) -> None:
    with pytest.raises(StackRefusedError, match=f"port {port} cannot be used: there is no such port"):
        Stack(tmp_path, environment=INSIDE).start_server(port)


@pytest.mark.parametrize("url", ["garbage", "localhost:4200", "http://", "http://host:99999/api", "ftp://host/api", "http://[::1/api"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(StackRefusedError, match="PREFECT_API_URL is"):
        Stack(tmp_path, environment={"PREFECT_API_URL": url}).start_server()


def test_a_port_beside_a_server_s_address_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StackRefusedError, match=r"--port .* PREFECT_API_URL names one"):
        Stack(tmp_path, environment=OUTSIDE).start_server(4200)


def test_a_server_that_refuses_access_or_is_not_there_is_reported(stack: Stack) -> None:
    with pytest.raises(StackRefusedError, match="refuses access; set PREFECT_API_AUTH_STRING"):
        require_access(stack.api_url, {"PREFECT_API_AUTH_STRING": "not:it"})
    require_access(stack.api_url, stack.environment())
    with listen(stack_free_port()) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
    with pytest.raises(StackError, match="no answer"):
        require_access(url, {})


def stack_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def test_a_kept_server_with_work_is_not_ended_by_a_command_with_another_port(stack: Stack) -> None:
    """Two commands on the volume of a server that was kept: one that wants another port, one that wants another server."""
    asked = credentials(stack.environment())
    flow = httpx.post(f"{stack.api_url}/flows/", json={"name": "from-the-ui"}, headers=asked).json()["id"]
    run = {"flow_id": flow, "name": "a run from the UI", "state": {"type": "RUNNING"}, "tags": [stack.tag]}
    made = httpx.post(f"{stack.api_url}/flow_runs/", json=run, headers=asked).json()["id"]
    stack.leave_running()
    try:
        for environment, port in ((INSIDE, stack_free_port()), (OUTSIDE, None)):
            with pytest.raises(StackRefusedError, match="have work: a run from the UI") as caught:
                Stack(stack.volume, environment=environment).start_server(port)
            assert stop_command(stack.volume) in str(caught.value)
        assert stack.children["server"].poll() is None
        same = Stack(stack.volume, environment=INSIDE)
        assert same.start_server() == stack.ui_url
        assert not same.fresh
        same._unlock()
    finally:
        httpx.delete(f"{stack.api_url}/flow_runs/{made}", headers=asked)
        (stack.home / "stack.json").unlink()


def test_the_command_that_stops_works_as_it_is_printed(tmp_path: Path) -> None:
    volume = tmp_path / "a volume"
    process = {STACK_VARIABLE: volume_id(volume)}
    with sleeper(**process) as leftover:
        command = {"args": ["bash", "-c", stop_command(volume)], "check": True, "cwd": "/", "env": {"PATH": "/usr/bin:/bin"}, "text": True}
        assert subprocess.run(**command, stdout=subprocess.PIPE).stdout == "ended: 1 process\n"
        assert leftover.wait(10) is not None
    assert subprocess.run(**command, stdout=subprocess.PIPE).stdout == "nothing of this volume was running\n"


def test_a_port_that_an_earlier_command_s_leftover_holds_is_ours(tmp_path: Path) -> None:
    code = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); time.sleep(60)"
    environment = {**os.environ, STACK_VARIABLE: volume_id(tmp_path)}
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
        worker.send_signal(signal.SIGSTOP)
        wait_until_stopped(worker.pid)
        with pytest.raises(StackError, match="worker of fvlm-gpu was stopped by a signal"):
            stack.check()
        worker.kill()
        worker.wait()
        with pytest.raises(StackError, match=r"worker of fvlm-gpu ended \(status -9\).*fvlm-gpu\.log") as caught:
            stack.check()
    assert "Run the same command again" in str(caught.value)


def wait_until_stopped(pid: int) -> None:
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.02)


def test_a_stack_that_was_left_but_died_is_not_taken_over(tmp_path: Path) -> None:
    stack = Stack(tmp_path, environment=OUTSIDE)
    stack.start_server()
    stack.leave_running()
    assert stack.kept() is None, "nothing of it runs"


def test_stopping_lets_a_job_save_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint may take longer than a server to end: a job has the time that its launcher gave it."""
    monkeypatch.setattr("infra.stack.END_GRACE_S", 0.5)
    volume = tmp_path / "volume"
    job = tmp_path / "job.py"
    job.write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(1.5)\n"
        "    pathlib.Path('saved').touch()\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(120)\n"
    )
    starter = (
        "import sys; from pathlib import Path; from infra.launch import launch; "
        f"launch([sys.executable, {str(job)!r}], Path({str(tmp_path / 'step')!r}), grace_s=60)"
    )
    environment = os.environ | {STACK_VARIABLE: volume_id(volume), "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", starter], env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL):
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        assert Stack(volume, environment={}).stop() == ["1 job"]
    assert (tmp_path / "saved").exists()
    assert not list(marked(STACK_VARIABLE, volume_id(volume)))


def test_stopping_does_not_wait_for_somebody_to_reap_a_job_that_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow run that hangs (on a server that is gone, say) leaves its job's guard a zombie."""
    monkeypatch.setattr("infra.stack.END_GRACE_S", 0.2)
    volume, ready = tmp_path / "volume", tmp_path / "ready"
    job = f"open({str(ready)!r}, 'w'); import time; time.sleep(600)"
    command = [sys.executable, guard.__file__, "PARENT", "1", sys.executable, "-c", job]
    starter = (
        "import os, signal, subprocess, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.Popen([word if word != 'PARENT' else str(os.getpid()) for word in {command!r}])\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", starter], env=os.environ | {STACK_VARIABLE: volume_id(volume)}):
        while not ready.exists():
            time.sleep(0.05)
        Stack(volume, environment={}).stop()
    assert not list(marked(STACK_VARIABLE, volume_id(volume)))
