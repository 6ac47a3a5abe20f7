"""The local stack of one volume: a Prefect server with its UI, the work pools, and a worker on each.

Where `PREFECT_API_URL` is set, that server is used and only workers are started, for pools that are of local processes. Every
process started here carries the volume's mark, so what a killed stack left behind is found and ended, and nothing else is.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from infra.locks import try_lock
from infra.processes import STACK_VARIABLE, end_marked, mark, marked

REPOSITORY = Path(__file__).resolve().parents[1]
FIRST_PORT = 4200
"""Prefect's own; the next free one is taken where it is in use and none was asked for."""
PORTS_TRIED = 50
HEALTH_TIMEOUT_S = 180.0
"""A first start makes the database: 8 s on two idle cores, much more on loaded ones."""
FOREIGN_HEALTH_TIMEOUT_S = 10.0
"""A server that `PREFECT_API_URL` names is there already."""
END_GRACE_S = 5.0
PROCESS_POOL = "process"


class StackError(RuntimeError):
    """The stack cannot start, or a part of it died; the message says what to do."""


class PortTakenError(StackError):
    """The port that was asked for is another program's; nothing was started."""


@dataclass(frozen=True)
class StackState:
    """What runs, as written to `stack.json`."""

    api_url: str
    ui_url: str
    owns_server: bool
    processes: dict[str, int]
    """Process id by name: server and workers."""


class Stack:
    """Server and workers of `volume`. Use `start`, then `check` now and then, then `stop` or `leave_running`."""

    def __init__(self, volume: Path, *, environment: Mapping[str, str]) -> None:
        self.volume, self.given = volume.resolve(), dict(environment)
        self.home = self.volume / "prefect"
        self.mark = mark(self.volume)
        self.state: StackState | None = None
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.lock: int | None = None
        self.fresh = True
        """False when a stack that was left running was taken over."""

    def start_server(self, port: int | None = None) -> str:
        """Start the server, or find the one to use; returns the address of its UI before it answers.

        Raises StackError: another command is using the volume, or the port is taken.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        self.lock = try_lock(self.home / "stack.lock")
        if self.lock is None:
            raise StackError(f"another fvlm command is running on {self.volume}; wait for it, or give another --volume")
        kept = self.kept()
        if kept and (port is None or not kept.owns_server or port == _port_of(kept.api_url)):
            self.state, self.fresh = kept, False
            return kept.ui_url
        if port is not None and not port_is_free(port) and not self._holds(port):
            self._unlock()
            raise PortTakenError(f"port {port} is taken by another program; give another --port, or none to take a free one")
        end_marked(STACK_VARIABLE, self.mark, grace_s=END_GRACE_S)
        if given := self.given.get("PREFECT_API_URL"):
            self.state = StackState(given, self.given.get("PREFECT_UI_URL", given.removesuffix("/api")), False, {})
            return self.state.ui_url
        port = free_port() if port is None else port
        url = f"http://127.0.0.1:{port}"
        self.state = StackState(f"{url}/api", url, True, {})
        self._spawn("server", ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)])
        return url

    def environment(self) -> dict[str, str]:
        """The environment of every process of the stack."""
        state = self._running_state()
        outside = {} if state.owns_server else {name: value for name, value in self.given.items() if name.startswith("PREFECT_")}
        kept = {name: value for name, value in self.given.items() if not name.startswith("PREFECT_")}
        return (
            kept
            | {
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
                "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
                "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
                "PREFECT_LOGGING_LEVEL": "INFO",
                "PREFECT_WORKER_QUERY_SECONDS": "1",
                "PREFECT_WORKER_PREFETCH_SECONDS": "1",
                "PREFECT_CLIENT_MAX_RETRIES": "10",
            }
            | outside
            | {
                "PREFECT_HOME": str(self.home),
                "PREFECT_API_URL": state.api_url,
                "PREFECT_UI_URL": state.ui_url,
                STACK_VARIABLE: self.mark,
                "PYTHONUNBUFFERED": "1",
            }
        )

    def client_environment(self) -> dict[str, str]:
        """What a program outside the stack needs to talk to its server."""
        return {name: value for name, value in self.environment().items() if name.startswith("PREFECT_")}

    def wait_for_server(self) -> None:
        """Return when the API answers. Raises StackError when our server died, or where there is no answer in time."""
        state = self._running_state()
        deadline = time.monotonic() + (HEALTH_TIMEOUT_S if state.owns_server else FOREIGN_HEALTH_TIMEOUT_S)
        while not healthy(state.api_url):
            self.check()
            if time.monotonic() > deadline:
                raise StackError(f"no answer from the Prefect API at {state.api_url}{self._log_hint('server')}")
            time.sleep(0.1)

    def start_workers(self, pool_types: Mapping[str, str]) -> None:
        """Start a worker on each pool that is of local processes (`pool_types`: type by pool name)."""
        if not self.fresh:
            return
        for pool, kind in pool_types.items():
            if kind == PROCESS_POOL:
                name = f"{pool}-{self.mark[:6]}"
                self._spawn(pool, ["-m", "prefect", "worker", "start", "--pool", pool, "--type", PROCESS_POOL, "--name", name])

    def check(self) -> None:
        """Raise StackError when the server or a worker has ended."""
        for name, pid in self._running_state().processes.items():
            child = self.children.get(name)
            if child.poll() is not None if child else not psutil.pid_exists(pid):
                what = "Prefect server" if name == "server" else f"worker of {name}"
                ended = f" (status {child.returncode})" if child else ""
                raise StackError(
                    f"the {what} ended{ended}{self._log_hint(name)}\nRun the same command again: finished steps are kept, training goes on "
                    "from its checkpoint."
                )

    def leave_running(self) -> None:
        """Write down what runs, so that a later command finds it or stops it."""
        (self.home / "stack.json").write_text(json.dumps(asdict(self._running_state())))
        self._unlock()

    def stop(self) -> None:
        """End everything that carries the volume's mark."""
        self._state_file().unlink(missing_ok=True)
        for child in self.children.values():
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
        end_marked(STACK_VARIABLE, self.mark, grace_s=END_GRACE_S)
        for child in self.children.values():
            child.wait()
        self._unlock()

    def _spawn(self, name: str, arguments: list[str]) -> None:
        """Start a process of the stack, in a session of its own: Ctrl-C in the terminal is ours to handle."""
        with (self.home / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=REPOSITORY,
                env=self.environment(),
                start_new_session=True,
            )
        self.children[name] = child
        self._running_state().processes[name] = child.pid

    def kept(self) -> StackState | None:
        """The stack that an earlier command left running, if all of it still runs."""
        try:
            state = StackState(**json.loads(self._state_file().read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        alive = all(_carries(pid, self.mark) for pid in state.processes.values())
        return state if alive and state.processes and healthy(state.api_url) else None

    def _holds(self, port: int) -> bool:
        """Whether a process that an earlier command left behind listens there."""
        listening = (one for process in marked(STACK_VARIABLE, self.mark) for one in process.net_connections("tcp"))
        return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in listening)

    def _state_file(self) -> Path:
        return self.home / "stack.json"

    def _running_state(self) -> StackState:
        if self.state is None:
            raise RuntimeError("start_server comes first")
        return self.state

    def _log_hint(self, name: str) -> str:
        log = self.home / f"{name}.log"
        return f"; its log: {log}" if log.exists() else ""

    def _unlock(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


def healthy(api_url: str) -> bool:
    """Whether the API answers."""
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def port_is_free(port: int) -> bool:
    """Whether a server could listen on it now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """Prefect's port or the next free one. Raises StackError when all of them are taken."""
    for port in range(FIRST_PORT, FIRST_PORT + PORTS_TRIED):
        if port_is_free(port):
            return port
    raise StackError(f"ports {FIRST_PORT} to {FIRST_PORT + PORTS_TRIED - 1} are all taken; give a free --port")


def _port_of(api_url: str) -> int:
    return int(api_url.removesuffix("/api").rpartition(":")[2])


def _carries(pid: int, value: str) -> bool:
    try:
        return psutil.Process(pid).environ().get(STACK_VARIABLE) == value
    except psutil.Error:
        return False
