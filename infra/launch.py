"""Runs one job as a subprocess: `python -m module job.yaml`, or the same under torchrun.

The job's output goes to `log.txt` in its folder; its last lines come back in the error. A job never outlives the process that
launched it (`guard.py`), and leftovers of an earlier launch of the same folder are ended first.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from infra import guard
from infra.processes import JOB_VARIABLE, STACK_VARIABLE, end_marked, mark

LOG_NAME = "log.txt"
BAD_INPUT = 2
"""Exit status of a job that was stopped by bad input; running it again is of no use."""
TAIL_LINES = 25
KEPT_VARIABLES = ("PATH", "HOME", "USER", "LANG", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", STACK_VARIABLE)
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
    """The job says that its input is bad: `reason` is its own message."""

    def __init__(self, command: str, reason: str, log: Path) -> None:
        super().__init__(command, BAD_INPUT, reason, log)
        self.reason = reason


class JobStoppedError(RuntimeError):
    """The job was stopped because its run was cancelled."""


class DiskFullError(RuntimeError):
    """Less free space than a job may start with."""


def python_job(module: str, settings: Path) -> list[str]:
    """The command of a single-process job."""
    return [sys.executable, "-m", module, str(settings)]


def torchrun_job(module: str, settings: Path, *, processes: int, nodes: int = 1, rendezvous: str | None = None) -> list[str]:
    """The command of a training job with `processes` ranks on this machine.

    With several `nodes` each of them starts this same command, and they meet at `rendezvous`, the first node's host:port.
    """
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", str(processes)]
    meeting = ["--standalone"] if nodes == 1 else ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", str(rendezvous)]
    return [*torchrun, *meeting, "-m", module, str(settings)]


def launch(
    command: list[str],
    folder: Path,
    *,
    threads: int = 1,
    min_free_bytes: int = 0,
    stop: threading.Event | None = None,
    watch: Callable[[], None] = lambda: None,
    poll_s: float = 0.2,
    watch_s: float = 1.0,
    grace_s: float = 10.0,
) -> None:
    """Run `command` to its end, with its output appended to `folder/log.txt`.

    `watch` is called every `watch_s` seconds in this thread. When `stop` is set, or this thread is interrupted by an exception, the
    job gets SIGTERM, and SIGKILL after `grace_s`. `threads` is OMP_NUM_THREADS.

    Raises JobRefusedError (the job says its input is bad), JobError, JobStoppedError, or DiskFullError before anything starts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < min_free_bytes:
        raise DiskFullError(f"{free / 1e9:.1f} GB free where {folder} is, {min_free_bytes / 1e9:.1f} GB needed")
    job = mark(folder)
    end_marked(JOB_VARIABLE, job)
    log = folder / LOG_NAME
    guarded = [sys.executable, "-S", "-E", guard.__file__, str(os.getpid()), str(grace_s), *command]
    with log.open("ab") as stream:
        start = stream.tell()
        process = subprocess.Popen(
            guarded,
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=job_environment(os.environ, threads=threads) | {JOB_VARIABLE: job},
            start_new_session=True,
        )
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
        raise _failure(command, process.returncode, log, start)


def job_environment(environment: Mapping[str, str], *, threads: int) -> dict[str, str]:
    """The part of `environment` that a job may see, and what every job gets."""
    kept = {name: value for name, value in environment.items() if name in KEPT_VARIABLES or name.startswith(KEPT_PREFIXES)}
    return kept | {"OMP_NUM_THREADS": str(max(1, threads)), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Stop the guard, which stops the job; nothing to do when it has ended."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=grace_s + 5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failure(command: list[str], status: int, log: Path, start: int) -> JobError:
    """The error of a job that ended with `status`; its output begins at byte `start` of `log`."""
    with log.open("rb") as stream:
        stream.seek(start)
        lines = stream.read().decode(errors="replace").splitlines()
    # torchrun ends with status 1 whatever its processes ended with, and says theirs in its report.
    if status == BAD_INPUT or any(re.match(rf"\s*exitcode\s*:\s*{BAD_INPUT}\s", line) for line in lines):
        return JobRefusedError(_short(command), _reason(lines), log)
    return JobError(_short(command), status, "\n".join(lines[-TAIL_LINES:]), log)


def _reason(lines: list[str]) -> str:
    """The job's own message: from its line `error: ...` to the line that says what to do, or to the end of what it indented."""
    for start, line in enumerate(lines):
        if line.startswith("error: "):
            message = lines[start:]
            fix = next((number for number, text in enumerate(message) if text.startswith("  fix: ")), None)
            if fix is None:
                fix = sum(1 for _ in itertools.takewhile(lambda text: text.startswith("  "), message[1:]))
            return "\n".join(message[: fix + 1]).removeprefix("error: ")
    return "\n".join(lines[-TAIL_LINES:])


def _short(command: list[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:]])
