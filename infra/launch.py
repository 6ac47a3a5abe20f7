"""Runs one job as a subprocess: `python -m module job.yaml`, or the same under torchrun.

The job's output goes to `log.txt` in its folder; its last lines come back in the error. A job never outlives the process that
launched it (`guard.py`), and leftovers of an earlier launch of the same folder are ended first.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from infra import guard, start
from infra.exit_status import ATTEMPT_VARIABLE, ERROR_FILE, STOPPED, STOPPED_KIND, USER_ERROR, USER_ERROR_KIND
from infra.fork_server import ForkedJob, ForkServer
from infra.processes import JOB_VARIABLE, STACK_VARIABLE, end_marked, mark
from infra.runpod.pod import SHARED_VARIABLE

LOG_NAME = "log.txt"
TAIL_LINES = 25
TORCHRUN = "torch.distributed.run"
"""The module behind the program `torchrun`."""
FORKED_RANKS = "infra.forked_ranks"
FULL_BYTES = 1_000_000
"""Of free space, below which a job that failed without a word of its own is said to have filled the disk."""
KEPT_VARIABLES = ("PATH", "HOME", "USER", "LANG", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", STACK_VARIABLE, SHARED_VARIABLE)
KEPT_PREFIXES = (
    *("LC_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "HF_", "WANDB_", "XDG_", "SSL_", "TORCH", "TRITON_"),
    *("http", "no_proxy", "HTTP", "NO_PROXY"),
)
"""What a job may see of the environment: where things are, the GPU, the network and the hubs; nothing of the orchestration."""


class JobError(RuntimeError):
    """A job ended badly. `status` is its exit status, `tail` the last lines of its log."""

    def __init__(self, command: str, status: int, tail: str, log: Path) -> None:
        last = next((line for line in reversed(tail.splitlines()) if line.strip()), "it printed nothing")
        super().__init__(f"{command} ended with status {status}: {last}\nwhole log: {log}\nits end:\n{tail}")
        self.command, self.status, self.tail, self.log = command, status, tail, log


class JobRefusedError(JobError):
    """The job refuses its input or its surroundings, and says in `error.json` what is wrong, where, and how to fix it."""

    def __init__(self, command: str, what: str, where: str, fix: str, log: Path) -> None:
        super().__init__(command, USER_ERROR, f"{what}\n  where: {where}\n  fix:   {fix}", log)
        self.what, self.where, self.fix = what, where, fix


class JobInterruptedError(JobError):
    """Somebody else stopped the job by SIGTERM; it has saved what it did and goes on when it is run again."""

    def __init__(self, command: str, reason: str, log: Path) -> None:
        super().__init__(command, STOPPED, reason, log)


class JobStoppedError(RuntimeError):
    """The job was stopped because its run was cancelled."""


class DiskFullError(RuntimeError):
    """Less free space than a job may start with, or none left for it to go on."""


def python_job(module: str, settings: Path) -> list[str]:
    """The command of a single-process job."""
    return [sys.executable, "-m", module, str(settings)]


def torchrun_job(module: str, settings: Path, *, processes: int, nodes: int = 1, rendezvous: str | None = None) -> list[str]:
    """The command of a training job with `processes` ranks on this machine.

    With several `nodes` each of them starts this same command, and they meet at `rendezvous`, the first node's host:port.
    """
    torchrun = [sys.executable, "-m", start.__name__, TORCHRUN, "--nproc-per-node", str(processes)]
    meeting = ["--standalone"] if nodes == 1 else ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", str(rendezvous)]
    return [*torchrun, *meeting, "-m", module, str(settings)]


def forked_ranks_job(module: str, settings: Path, *, processes: int) -> list[str]:
    """The same on this machine alone, with ranks that are forked off their launcher: for a fork server, which has imported the module."""
    return [sys.executable, "-m", FORKED_RANKS, str(processes), module, str(settings)]


def launch(
    command: list[str],
    folder: Path,
    *,
    threads: int = 1,
    min_free_bytes: int = 0,
    devices: Mapping[str, str] | None = None,
    server: ForkServer | None = None,
    stop: threading.Event | None = None,
    watch: Callable[[], None] = lambda: None,
    poll_s: float = 0.2,
    watch_s: float = 1.0,
    grace_s: float = 10.0,
) -> None:
    """Run `command` to its end, with its output appended to `folder/log.txt`.

    `watch` is called every `watch_s` seconds in this thread. When `stop` is set, or this thread is interrupted by an exception, the
    job gets SIGTERM, and SIGKILL after `grace_s`: the time it has for saving what it did. `threads` is OMP_NUM_THREADS; `devices` are
    variables that say which GPUs it sees (`infra.devices`); `server` forks it, where it is not to start from nothing.

    Raises JobRefusedError (the job says what is wrong), JobInterruptedError (somebody else stopped it), another JobError,
    JobStoppedError, or DiskFullError (also before anything starts).
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < min_free_bytes:
        raise DiskFullError(f"{free / 1e9:.1f} GB free where {folder} is, {min_free_bytes / 1e9:.1f} GB needed")
    job = mark(folder)
    end_marked(JOB_VARIABLE, job)
    attempt = uuid.uuid4().hex
    environment = job_environment(os.environ, threads=threads) | dict(devices or {}) | _torchrun_grace(grace_s)
    environment |= {JOB_VARIABLE: job, ATTEMPT_VARIABLE: attempt}
    log = folder / LOG_NAME
    with log.open("ab") as stream:
        begin = stream.tell()
        process = (server.start if server else _start)(command, stream, environment, grace_s)
    watched = time.monotonic()
    try:
        while process.poll() is None:
            if stop is not None and stop.wait(poll_s):
                raise JobStoppedError(f"{_short(command)} was stopped")
            if stop is None:
                time.sleep(poll_s)
            if time.monotonic() - watched >= watch_s:
                watched = time.monotonic()
                watch()
    finally:
        _end(process, grace_s)
    watch()
    if process.returncode:
        raise _failure(command, process.returncode, folder, begin, attempt)


def job_environment(environment: Mapping[str, str], *, threads: int) -> dict[str, str]:
    """The part of `environment` that a job may see, and what every job gets."""
    kept = {name: value for name, value in environment.items() if name in KEPT_VARIABLES or name.startswith(KEPT_PREFIXES)}
    return kept | {"OMP_NUM_THREADS": str(max(1, threads)), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def _start(command: Sequence[str], log: IO[bytes], environment: Mapping[str, str], grace_s: float) -> subprocess.Popen[bytes]:
    """Start the command under a guard."""
    return subprocess.Popen(
        [sys.executable, "-S", "-E", guard.__file__, str(os.getpid()), str(grace_s), *command],
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )


def _torchrun_grace(grace_s: float) -> dict[str, str]:
    """torchrun kills its ranks 30 s after it passed a SIGTERM on, whatever grace it was itself given."""
    return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(grace_s))}


def _end(process: subprocess.Popen[bytes] | ForkedJob, grace_s: float) -> None:
    """Stop the guard, which stops the job; nothing to do when it has ended."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=grace_s + 5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failure(command: list[str], status: int, folder: Path, start: int, attempt: str) -> RuntimeError:
    """The error of a job that ended with `status`; its output begins at byte `start` of its log."""
    log = folder / LOG_NAME
    with log.open("rb") as stream:
        stream.seek(start)
        tail = "\n".join(stream.read().decode(errors="replace").splitlines()[-TAIL_LINES:])
    said = _error_file(folder, attempt)
    if said.get("kind") == USER_ERROR_KIND:
        return JobRefusedError(_short(command), said["what"], said["where"], said["fix"], log)
    if said.get("kind") == STOPPED_KIND:
        return JobInterruptedError(_short(command), f"{said['what']}; {said['fix']}", log)
    if shutil.disk_usage(folder).free < FULL_BYTES:  # too full for a job to say so
        return DiskFullError(f"{_short(command)} failed: the disk is full where {folder} is")
    return JobError(_short(command), status, tail, log)


def _error_file(folder: Path, attempt: str) -> dict[str, str]:
    """What this start of the job left in `error.json`, or nothing."""
    try:
        said = json.loads((folder / ERROR_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return said if said["attempt"] == attempt else {}


def _short(command: list[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:]])
