"""Starts many short jobs quickly: each is forked off a process that has already imported the modules that all of them need.

Importing torch and transformers takes five CPU seconds, more than a small training run itself. A fork server, like the one that Python's
multiprocessing has for functions, imports them once. `ForkServer` is the client in the launcher; the server is
`python -m infra.fork_server MODULES`, whose standard input is a socket. A request is one message: the job as JSON, and two file
descriptors, one for its log and one for a pipe. The pipe returns the process id of the job's guard and, once the job has ended, its exit
status.

Like any other job, a forked one has a guard (`guard.py`). When the launcher ends, for whatever reason, its end of the socket is closed;
the server then ends, and the kernel signals the guards. A server that died is restarted for the next job.
"""

import contextlib
import gc
import importlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from infra import guard
from infra.processes import JOB_VARIABLE, UNMARKED, change_mark
from infra.start import collect_rarely, run

LARGEST = 1 << 17
"""Maximum size of a request in bytes; an environment takes a few thousand."""
NUMBER_BYTES = 8
"""Size of a process id and of an exit status in the pipe."""
THREADS = "OMP_NUM_THREADS"
NEVER_BEGUN = 1
"""Exit status of a job that the server could not fork: the server died, e.g. because an import failed, or it ran out of memory."""
LOST = 128 + signal.SIGKILL
"""Exit status of a job whose guard died before it reported one."""
POLL_S = 0.05


class ForkedJob:
    """The guard of a job, with the part of the `subprocess.Popen` interface that a launcher needs."""

    def __init__(self, pipe: int) -> None:
        """`pipe` delivers the guard's process id once the job is forked, which takes seconds while the server is still importing."""
        os.set_blocking(pipe, False)
        self._pipe = pipe
        self._forked = False
        self._guard: int | None = None
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, or None while the job runs."""
        while self.returncode is None:
            try:
                said = os.read(self._pipe, NUMBER_BYTES)
            except BlockingIOError:
                break
            if said and not self._forked:
                self._forked = True
                with contextlib.suppress(ProcessLookupError):  # it has ended already
                    self._guard = os.pidfd_open(int.from_bytes(said))
            else:
                self._ended(int.from_bytes(said) if said else LOST if self._forked else NEVER_BEGUN)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the job to end and return its exit status. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(guard.NAME, timeout or 0)
            time.sleep(POLL_S)
        return status

    def terminate(self) -> None:
        """Send SIGTERM. A job that is not forked yet will not be started."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL. A job that is not forked yet will not be started."""
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is not None:
            return
        if not self._forked:
            self._ended(128 + number)  # closes the pipe; a guard whose pipe has no reader starts no job
        elif self._guard is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._guard, number)

    def _ended(self, status: int) -> None:
        self.returncode = status
        os.close(self._pipe)
        if self._guard is not None:
            os.close(self._guard)


@dataclass
class _Server:
    process: subprocess.Popen[bytes]
    requests: socket.socket


class ForkServer:
    """Forks jobs off processes that have imported `modules`: one process per number of threads, which torch reads only once."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = modules
        self._servers: dict[str, _Server] = {}
        self._lock = threading.Lock()

    def runs(self, threads: int) -> bool:
        """Return whether a server for this number of threads is running. Any other job can then be forked off it too."""
        with self._lock:
            server = self._servers.get(str(threads))
            return server is not None and server.process.poll() is None

    def start(self, command: Sequence[str], log: IO[bytes], environment: Mapping[str, str], grace_s: float) -> ForkedJob:
        """Start a job, `python -m MODULE ARGUMENTS...`, and its server if that is not running."""
        if list(command[:2]) != [sys.executable, "-m"]:
            raise ValueError(f"only modules of this Python can be forked, not {' '.join(command)}")
        request = {"command": command[2:], "environment": dict(environment), "grace_s": grace_s}
        pipe, said = os.pipe()
        job = ForkedJob(pipe)
        try:
            with self._lock:
                requests = self._server(environment, log)
                with contextlib.suppress(ConnectionError):  # the server has died, which the pipe reports
                    socket.send_fds(requests, [json.dumps(request).encode()], [log.fileno(), said])
        except BaseException:
            job.kill()
            raise
        finally:
            os.close(said)
        return job

    def close(self) -> None:
        """Stop the servers. Jobs that are still running get SIGTERM."""
        with self._lock:
            for server in self._servers.values():
                server.requests.close()
                server.process.terminate()
                server.process.wait()
            self._servers.clear()

    def _server(self, environment: Mapping[str, str], log: IO[bytes]) -> socket.socket:
        """Return the socket of a running server, started if needed. Its output during the imports goes to `log`, that of the first job."""
        threads = environment[THREADS]
        server = self._servers.get(threads)
        if server is None or server.process.poll() is not None:
            ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with its:
                process = subprocess.Popen(
                    [sys.executable, "-m", "infra.fork_server", ",".join(self.modules)],
                    stdin=its.fileno(),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**environment, JOB_VARIABLE: UNMARKED},
                    start_new_session=True,
                )
            server = self._servers[threads] = _Server(process, ours)
        return server.requests


def next_job(modules: str) -> list[str]:
    """Run the server: import the comma-separated modules, then fork for each request. Returns in each job's process, with its command."""
    for module in modules.split(","):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # garbage collection would write to every object, and so copy the memory that the jobs share
    server = os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the guards
    requests = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, sys.stdin.fileno())
    _print_into(nothing)  # only the imports belong in the first job's log
    os.close(nothing)
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, LARGEST, 2)
        if not message:
            os._exit(0)
        try:
            if os.fork() == 0:
                break
        except OSError as error:  # out of memory, or too many processes: only this job fails
            os.write(descriptors[0], f"cannot fork: {error}\n".encode())
        for descriptor in descriptors:
            os.close(descriptor)
    requests.close()
    return _guarded(json.loads(message), *descriptors, server=server)


def _guarded(request: dict[str, Any], log: int, said: int, *, server: int) -> list[str]:
    """In the server's child: become the guard of a job, fork the job, and return its command in the job's process."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _print_into(log)
    os.close(log)
    change_mark(JOB_VARIABLE, UNMARKED, request["environment"][JOB_VARIABLE])
    os.environ.clear()
    os.environ.update(request["environment"])
    own, job_guard = os.getpid(), guard.Guard(server)
    try:
        os.write(said, own.to_bytes(NUMBER_BYTES))
    except BrokenPipeError:  # the launcher has ended, or no longer wants the job
        os._exit(128 + signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, guard.STOPPING)  # no signal may reach the job while it still has the guard's handlers
    if job := os.fork():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, guard.STOPPING)
        status = LOST
        try:
            status = job_guard.watch(guard.Forked(job), request["grace_s"])
            with contextlib.suppress(BrokenPipeError):  # the launcher has ended
                os.write(said, status.to_bytes(NUMBER_BYTES))
        finally:
            os._exit(status)
    os.close(said)
    own_process("fvlm-job")
    os.setsid()
    guard.end_with(own)
    return request["command"]


def _print_into(descriptor: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())


def own_process(name: str) -> None:
    """Give this process a name, and reset the signal handlers that it inherited from its parent."""
    guard.set_name(name)
    for number in guard.STOPPING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, guard.STOPPING)


if __name__ == "__main__":
    collect_rarely()
    run(next_job(sys.argv[1]))
