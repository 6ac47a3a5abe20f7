"""The local stack of one volume: a Prefect server with its UI, the work pools, and a worker on each.

If `PREFECT_API_URL` is set, that server is used and only workers are started. Every process started here carries the volume's id, so that
exactly the leftovers of a killed stack can be found and ended.
"""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import psutil

from infra import api, guard, prefect_settings
from infra.locks import Lock, try_lock
from infra.ports import FIRST_PORT, LOCALHOST, PORTS_TRIED, address_of, listen, listen_on_free
from infra.processes import STACK_VARIABLE, end_marked, marked, wait_until_ended
from infra.start import PREPARED
from infra.volume import HOME, PASSWORD_FILE, database_folder, known_volume_id, password, volume_id

REPOSITORY = Path(__file__).resolve().parents[1]
HEALTH_TIMEOUT_S = 180.0
"""The first start creates the database: 8 s on two idle cores, much more on loaded ones."""
FOREIGN_HEALTH_TIMEOUT_S = 10.0
"""The server that `PREFECT_API_URL` names should already be running."""
PROBE_TIMEOUT_S = 3.0
END_GRACE_S = 5.0
PROCESS_POOL, RENTED_POOL = OWN_POOLS = ("process", "runpod")
"""Types of work pools whose workers a stack starts."""
WORKER_MODULES = "prefect.cli.worker,prefect.workers.process"
"""What a worker imports before it does anything."""
GO_ON = "Run the same command again: finished steps are kept, training goes on from its checkpoint."


class StackError(RuntimeError):
    """The stack cannot start, or a part of it died; the message says what to do."""


class StackRefusedError(StackError):
    """The request cannot be met, e.g. because another program uses the port. Nothing was started or ended."""


@dataclass(frozen=True)
class StackState:
    """A running stack, as written to `stack.json`."""

    api_url: str
    ui_url: str
    owns_server: bool
    processes: dict[str, int]
    """Process id by name: server and workers."""


class Stack:
    """Server and workers of `volume`. Call `start_server`, then `check` from time to time, then `stop` or `leave_running`."""

    def __init__(self, volume: Path, *, environment: Mapping[str, str], address: str | None = None) -> None:
        """`address` is the URL by which browsers and other hosts reach our server, if it differs from the local one."""
        self.volume, self.given, self.address = volume.resolve(), dict(environment), address
        self.home = self.volume / HOME
        self.state: StackState | None = None
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.prepared: dict[str, subprocess.Popen[bytes]] = {}
        """Workers, by pool, that have been started and wait for their command."""
        self.lock: Lock | None = None
        self.fresh = True
        """False if a stack that was left running is used."""

    @property
    def id(self) -> str:
        """The volume's id."""
        return volume_id(self.volume)

    @property
    def tag(self) -> str:
        """Tag of every deployment of the volume, and so of all of its runs."""
        return volume_tag(self.id)

    @property
    def api_url(self) -> str:
        return self._running_state().api_url

    @property
    def ui_url(self) -> str:
        return self._running_state().ui_url

    @property
    def owns_server(self) -> bool:
        return self._running_state().owns_server

    def start_server(self, port: int | None = None) -> str:
        """Start the server, or find the one to use. Returns the address of its UI, possibly before the server answers.

        Raises StackRefusedError if the request cannot be met, StackError if another command is using the volume.
        """
        given = self.given.get("PREFECT_API_URL") or None
        if given is not None and port is not None:
            raise StackRefusedError(
                f"--port is for a server that is started here, but PREFECT_API_URL names one ({given}); unset one of them"
            )
        if given is not None and (problem := api.problem_with(given)):
            raise StackRefusedError(f"PREFECT_API_URL is {given!r}: {problem}")
        self.home.mkdir(parents=True, exist_ok=True)
        self.lock = try_lock(self.home / "stack.lock")
        if self.lock is None:
            raise StackError(f"another fvlm command is running on {self.volume}; wait for it, or give another --volume")
        try:
            return self._take_over(given, port) or self._begin(given, port)
        finally:
            if self.state is None:
                self._unlock()

    def _take_over(self, given: str | None, port: int | None) -> str | None:
        """Use the stack that was left running, if it is the requested one. Raises StackRefusedError if it is not and still has work."""
        kept = self.kept()
        if kept is None:
            return None
        same = given == kept.api_url if given else port is None or (kept.owns_server and port == urlsplit(kept.api_url).port)
        environment = self._environment_of(kept)
        if same:
            self.state, self.fresh = kept, False
            self.given |= {name: environment[name] for name in prefect_settings.PASSWORDS if name in environment}
            return kept.ui_url
        runs = api.active_runs(kept.api_url, environment, self.tag)
        if runs:
            raise StackRefusedError(
                f"the server and workers that were left running on {self.volume} have work: {', '.join(runs)} (see {kept.ui_url}). "
                f"Wait for it; or use them: give no --port, and PREFECT_API_URL as it was; or end them: {stop_command(self.volume)}"
            )
        return None

    def _begin(self, given: str | None, port: int | None) -> str:
        """End what an earlier command left behind, and start a server unless `given` names one."""
        host = self.given.get("PREFECT_SERVER_API_HOST", LOCALHOST)
        if port is None and given is None and "PREFECT_SERVER_API_PORT" in self.given:
            port = _number(self.given["PREFECT_SERVER_API_PORT"], "PREFECT_SERVER_API_PORT")
        listener = None
        if port is not None and not self._holds(port):
            listener = self._listen(port, host)
        end_marked(STACK_VARIABLE, self.id, grace_s=END_GRACE_S)
        self._state_file().unlink(missing_ok=True)
        if given is not None:
            self.state = StackState(given, self.given.get("PREFECT_UI_URL", given.removesuffix("/api")), False, {})
            return self.state.ui_url
        with listener or self._listen(port, host) as listener:
            url = address_of(LOCALHOST if host in ("0.0.0.0", "::") else host, listener.getsockname()[1])
            base = self.given.get("PREFECT_SERVER_API_BASE_PATH", "/api")
            self.state = StackState(url + base, self.address or url, True, {})
            if self.address:
                self.given["PREFECT_SERVER_UI_API_URL"] = self.address + base
            self.database_folder().mkdir(parents=True, exist_ok=True)
            self._spawn("server", self.server_arguments(listener), listener.fileno())
        return self.state.ui_url

    def server_arguments(self, listener: socket.socket) -> list[str]:
        """Return the module that serves on the socket, and its arguments."""
        return ["infra.server", "--socket", str(listener.fileno())]

    def _listen(self, port: int | None, host: str) -> socket.socket:
        """Return a socket that listens on the port, or on a free one if `port` is None."""
        try:
            if (listener := listen_on_free(host) if port is None else listen(port, host)) is not None:
                return listener
        except OSError as error:
            at = f"port {port}" if port is not None else f"the address {host} (PREFECT_SERVER_API_HOST)"
            raise StackRefusedError(f"{at} cannot be used: {error.strerror}; give another --port, or none to take a free one") from None
        raise StackError(f"ports {FIRST_PORT} to {FIRST_PORT + PORTS_TRIED - 1} are all taken; give a free --port")

    def environment(self) -> dict[str, str]:
        """The environment of every process of the stack."""
        state = self._running_state()
        kept = prefect_settings.without(self.given)
        bin_folder = str(Path(sys.executable).parent)
        return (
            kept
            | (self._settings_of_own_server() if state.owns_server else prefect_settings.of_users_server(self.given))
            | {
                "PREFECT_HOME": str(self.home),
                "PREFECT_API_URL": state.api_url,
                "PREFECT_UI_URL": state.ui_url,
                STACK_VARIABLE: self.id,
                "PATH": os.pathsep.join([bin_folder, self.given.get("PATH", os.defpath)]),  # flow runs are started as `python`
                "PYTHONUNBUFFERED": "1",
            }
        )

    def client_environment(self) -> dict[str, str]:
        """The variables that a program outside the stack needs to use its server."""
        return {name: value for name, value in self.environment().items() if name.startswith("PREFECT_")}

    def opening_link(self) -> str | None:
        """Return a link that opens our server's UI without asking for the password; None if server or password are the user's own."""
        state = self._running_state()
        if not state.owns_server or self.environment()[prefect_settings.CLIENT_PASSWORD] != password(self.volume):
            return None
        return f"{state.ui_url}/open#{quote(password(self.volume))}"

    @property
    def password_file(self) -> Path:
        """File with the password of our own server."""
        return self.home / PASSWORD_FILE

    def database_folder(self) -> Path:
        """Return the folder of our own server's SQLite database, unless the user's settings name another one."""
        state = self.given.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        return database_folder(self.volume, Path(state))

    def wait_for_server(self) -> None:
        """Wait until the API answers. Raises StackError if our server dies, if there is no answer in time, or if access is refused."""
        state = self._running_state()
        deadline = time.monotonic() + (HEALTH_TIMEOUT_S if state.owns_server else FOREIGN_HEALTH_TIMEOUT_S)
        while True:
            if self.answers():
                with contextlib.suppress(httpx.HTTPError):  # it died after that answer
                    return _refuse_if_closed(state.api_url, self.environment())
            self.check()
            if time.monotonic() > deadline:
                raise StackError(f"no answer from the Prefect API at {state.api_url}{self._log_hint('server')}")
            time.sleep(0.1)

    def answers(self) -> bool:
        """Whether the server's API answers now."""
        return api.healthy(self.api_url, PROBE_TIMEOUT_S)

    def prepare_worker(self, pool: str) -> None:
        """Start the pool's worker so that it imports its modules while the server does; it gets its command from `start_workers`."""
        if self.fresh:
            self.prepared[pool] = self._process(pool, [PREPARED, WORKER_MODULES], piped=True)

    def start_workers(self, pool_types: Mapping[str, str], *, every_queue: bool = False, more: Mapping[str, str] | None = None) -> None:
        """Start a worker for each pool of local processes or of RunPod's pods that has none yet. `pool_types` gives the type by pool name.

        A worker serves the volume's queue of its pool. With `every_queue`, it serves all queues of the pool, also ones that are added
        later, and does not create the pool. `more` are environment variables for the workers only.
        """
        if not self.fresh:
            return
        for pool, kind in pool_types.items():
            if kind in OWN_POOLS and pool not in self.children:
                queue = ["--no-create-pool-if-not-found"] if every_queue else ["--work-queue", queue_name(self.id)]
                who = ["--pool", pool, "--type", kind, *queue, "--name", f"{pool}-{self.id}"]
                self._spawn(pool, ["prefect", "worker", "start", *who], more=more)

    def check(self) -> None:
        """Raise StackError if the server or a worker has ended, or was stopped (SIGSTOP)."""
        for name, pid in [*self._running_state().processes.items()]:  # more may be started meanwhile
            child = self.children.get(name)
            what = _part(name)
            if child.poll() is not None if child else not psutil.pid_exists(pid):
                ended = f" (status {child.returncode})" if child else ""
                raise StackError(f"the {what} ended{ended}{self._log_hint(name)}\n{GO_ON}")
            with contextlib.suppress(psutil.Error):
                if psutil.Process(pid).status() == psutil.STATUS_STOPPED:
                    raise StackError(f"the {what} was stopped by a signal (process {pid})\n{GO_ON}")

    def leave_running(self) -> None:
        """Record the running processes, so that a later command can find or stop them."""
        self._state_file().write_text(json.dumps(asdict(self._running_state())))
        self._unlock()

    def stop(self) -> list[str]:
        """End everything that carries the volume's id. Returns what was running: the server, the workers and the number of jobs."""
        ended = self._running()
        self._state_file().unlink(missing_ok=True)
        for child in self.children.values():
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
        if (known := known_volume_id(self.volume)) is not None:
            _let_jobs_save(known)
            end_marked(STACK_VARIABLE, known, grace_s=END_GRACE_S)
        for child in (*self.children.values(), *self.prepared.values()):
            child.wait()
        self._unlock()
        return ended

    def _running(self) -> list[str]:
        """What of the volume's stack runs now."""
        if (known := known_volume_id(self.volume)) is None:
            return []
        names = []
        for process in marked(STACK_VARIABLE, known):
            with contextlib.suppress(psutil.Error):  # ended meanwhile
                names.append(process.name())
        try:
            processes = StackState(**json.loads(self._state_file().read_text())).processes
        except (FileNotFoundError, ValueError, TypeError):
            processes = {}
        parts = [_part(name) for name, pid in processes.items() if _carries(pid, known)]
        if jobs := names.count(guard.NAME):
            parts.append(f"{jobs} job{'s' if jobs > 1 else ''}")
        return parts or ([f"{len(names)} process{'es' if len(names) > 1 else ''}"] if names else [])

    def kept(self) -> StackState | None:
        """Return the stack that an earlier command left running, if all of it is still running."""
        try:
            state = StackState(**json.loads(self._state_file().read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        alive = all(_carries(pid, self.id) for pid in state.processes.values())
        return state if alive and state.processes and api.healthy(state.api_url) else None

    def _settings_of_own_server(self) -> dict[str, str]:
        port = urlsplit(self._running_state().api_url).port
        folder = self.database_folder()
        return prefect_settings.of_own_server(
            self.given,
            origins=",".join(dict.fromkeys([self._running_state().ui_url, f"http://{LOCALHOST}:{port}", f"http://localhost:{port}"])),
            password=password(self.volume),
            database=None if folder == self.home else folder / "prefect.db",
        )

    def _environment_of(self, kept: StackState) -> dict[str, str]:
        """Return the environment of a stack that was left running: the user's settings may have changed since."""
        try:
            return psutil.Process(next(iter(kept.processes.values()))).environ()
        except psutil.Error:
            return {}

    def _spawn(self, name: str, command: list[str], *handles: int, more: Mapping[str, str] | None = None) -> None:
        """Start a part of the stack: a module and its arguments, with inherited file descriptors `handles` and `more` variables."""
        child = None if more else self.prepared.pop(name, None)
        if child is not None and child.stdin is not None:
            with contextlib.suppress(BrokenPipeError), child.stdin as pipe:  # if it has died, `check` reports it
                pipe.write(json.dumps(command).encode())
        else:
            child = self._process(name, command, *handles, more=more)
        self.children[name] = child
        self._running_state().processes[name] = child.pid

    def _process(
        self, name: str, command: list[str], *handles: int, more: Mapping[str, str] | None = None, piped: bool = False
    ) -> subprocess.Popen[bytes]:
        """Start a process with a log of this name, in its own session so that Ctrl-C does not reach it. `piped`: its stdin is a pipe."""
        with (self.home / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "infra.start", *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                cwd=REPOSITORY,
                env=self.environment() | dict(more or {}),
                start_new_session=True,
                pass_fds=[handle for handle in handles if handle >= 0],
            )

    def _holds(self, port: int) -> bool:
        """Return whether a process that an earlier command left behind listens on the port."""
        listening = (one for process in marked(STACK_VARIABLE, self.id) for one in process.net_connections("tcp"))
        return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in listening)

    def _state_file(self) -> Path:
        return self.home / "stack.json"

    def _running_state(self) -> StackState:
        if self.state is None:
            raise RuntimeError("call start_server first")
        return self.state

    def _log_hint(self, name: str) -> str:
        log = self.home / f"{name}.log"
        return f"; its log: {log}" if log.exists() else ""

    def _unlock(self) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None


def volume_tag(volume: str) -> str:
    """Tag of all deployments and runs of the volume with this id."""
    return f"volume:{volume}"


def queue_name(volume: str) -> str:
    """Name of the volume's work queue in each pool: its workers only take runs from this queue."""
    return f"fvlm-{volume}"


def stop_command(volume: Path) -> str:
    """Return the shell command that stops the stack of the volume."""
    return shlex.join([str(Path(sys.executable).with_name("fvlm")), "stop", "--volume", str(volume)])


def require_access(api_url: str, environment: Mapping[str, str]) -> None:
    """Raise StackRefusedError if the API rejects the password or key in `environment`, StackError if it does not answer."""
    try:
        _refuse_if_closed(api_url, environment)
    except httpx.HTTPError as error:
        raise StackError(f"no answer from the Prefect API at {api_url}: {error}") from None


def _refuse_if_closed(api_url: str, environment: Mapping[str, str]) -> None:
    if api.refused(api_url, environment):
        raise StackRefusedError(f"the Prefect API at {api_url} refuses access; set PREFECT_API_AUTH_STRING or PREFECT_API_KEY for it")


def _number(text: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise StackRefusedError(f"{where} is {text!r}, which is not a number") from None


def _let_jobs_save(volume: str) -> None:
    """Send SIGTERM to all processes of the volume, and wait for its jobs, which may have a checkpoint to write.

    The wait is bounded, because a job's guard kills it when its grace period is over.
    """
    processes = list(marked(STACK_VARIABLE, volume))
    guards = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            guards += [process] if process.name() == guard.NAME else []
            process.terminate()
    wait_until_ended(guards)


def _part(name: str) -> str:
    return "Prefect server" if name == "server" else f"worker of {name}"


def _carries(pid: int, value: str) -> bool:
    try:
        return psutil.Process(pid).environ().get(STACK_VARIABLE) == value
    except psutil.Error:
        return False
