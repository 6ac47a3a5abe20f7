"""Runs one job as a subprocess: `python -m module job.yaml`, or the same under torchrun.

The job's output goes to `log.txt` in its folder; an error includes its last lines. A job never outlives the process that launched it
(`guard.py`), and processes left over from an earlier launch in the same folder are ended first.
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
"""If less free space than this is left, a job that failed without reporting an error is assumed to have filled the disk."""
KEPT_VARIABLES = ("PATH", "HOME", "USER", "LANG", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", STACK_VARIABLE, SHARED_VARIABLE)
KEPT_PREFIXES = (
    *("LC_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "HF_", "WANDB_", "XDG_", "SSL_", "TORCH", "TRITON_"),
    *("http", "no_proxy", "HTTP", "NO_PROXY"),
)
"""Environment variables that a job may see: paths, GPU, network and model hubs. Nothing about the orchestration is among them."""


class JobError(RuntimeError):
    """A job failed. `status` is its exit status, `tail` the last lines of its log."""

    def __init__(self, command: str, status: int, tail: str, log: Path) -> None:
        last = next((line for line in reversed(tail.splitlines()) if line.strip()), "it printed nothing")
        super().__init__(f"{command} ended with status {status}: {last}\nwhole log: {log}\nits end:\n{tail}")
        self.command, self.status, self.tail, self.log = command, status, tail, log


class JobRefusedError(JobError):
    """The job rejected its input or environment; its `error.json` says what is wrong, where, and how to fix it."""

    def __init__(self, command: str, what: str, where: str, fix: str, log: Path) -> None:
        super().__init__(command, USER_ERROR, f"{what}\n  where: {where}\n  fix:   {fix}", log)
        self.what, self.where, self.fix = what, where, fix


class JobInterruptedError(JobError):
    """The job was stopped by a SIGTERM from elsewhere. It has saved its state and resumes when it is run again."""

    def __init__(self, command: str, reason: str, log: Path) -> None:
        super().__init__(command, STOPPED, reason, log)


class JobStoppedError(RuntimeError):
    """The job was stopped because its run was cancelled."""


class DiskFullError(RuntimeError):
    """There is too little free space to start a job, or a running job has filled the disk."""


def python_job(module: str, settings: Path) -> list[str]:
    """The command of a single-process job."""
    return [sys.executable, "-m", module, str(settings)]


def torchrun_job(module: str, settings: Path, *, processes: int, nodes: int = 1, rendezvous: str | None = None) -> list[str]:
    """The command of a training job with `processes` ranks on this machine.

    With several `nodes`, each of them runs this same command, and they meet at `rendezvous`, the first node's host:port.
    """
    torchrun = [sys.executable, "-m", start.__name__, TORCHRUN, "--nproc-per-node", str(processes)]
    meeting = ["--standalone"] if nodes == 1 else ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", str(rendezvous)]
    return [*torchrun, *meeting, "-m", module, str(settings)]


def forked_ranks_job(module: str, settings: Path, *, processes: int) -> list[str]:
    """The command of a single-machine training job whose ranks are forked, for use with a fork server that has imported the module."""
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
    job gets SIGTERM, and SIGKILL after `grace_s` seconds, in which it can save its state. `threads` sets OMP_NUM_THREADS; `devices` are
    the environment variables that select its GPUs (`infra.devices`); `server` is the fork server that starts it, or None for a new process.

    Raises JobRefusedError (the job rejected its input), JobInterruptedError (something else stopped it), JobError (any other failure),
    JobStoppedError (`stop` was set), or DiskFullError (possibly before the job starts).
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
    """Return the part of `environment` that a job may see, plus the variables that every job gets."""
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
    """Give the ranks of torchrun the same grace period: by default it kills them 30 s after it has passed on a SIGTERM."""
    return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(grace_s))}


def _end(process: subprocess.Popen[bytes] | ForkedJob, grace_s: float) -> None:
    """Stop the guard, which stops the job, unless it has already ended."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=grace_s + 5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failure(command: list[str], status: int, folder: Path, start: int, attempt: str) -> RuntimeError:
    """Return the error of a job that ended with `status`. Its output starts at byte `start` of its log."""
    log = folder / LOG_NAME
    with log.open("rb") as stream:
        stream.seek(start)
        tail = "\n".join(stream.read().decode(errors="replace").splitlines()[-TAIL_LINES:])
    said = _error_file(folder, attempt)
    if said.get("kind") == USER_ERROR_KIND:
        return JobRefusedError(_short(command), said["what"], said["where"], said["fix"], log)
    if said.get("kind") == STOPPED_KIND:
        return JobInterruptedError(_short(command), f"{said['what']}; {said['fix']}", log)
    if shutil.disk_usage(folder).free < FULL_BYTES:  # too full for the job to write its own error
        return DiskFullError(f"{_short(command)} failed: the disk is full where {folder} is")
    return JobError(_short(command), status, tail, log)


def _error_file(folder: Path, attempt: str) -> dict[str, str]:
    """Return the content of `error.json` if this attempt wrote it, otherwise an empty dict."""
    try:
        said = json.loads((folder / ERROR_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return said if said["attempt"] == attempt else {}


def _short(command: list[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:]])
