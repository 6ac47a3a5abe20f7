"""Marks processes with an environment variable that says what they belong to, so that exactly the leftover processes can be found."""

import ctypes
import hashlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

STACK_VARIABLE = "FVLM_STACK"
"""Marks the server, workers and flow runs of one volume's local stack."""
JOB_VARIABLE = "FVLM_JOB"
"""Marks the processes of the job that writes one folder."""
UNMARKED = "0" * 16
"""Placeholder for the mark of a process that has none yet; `change_mark` overwrites it."""
POLL_S = 0.05


def mark(folder: Path) -> str:
    """Return the mark of processes that work on `folder`."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


def change_mark(variable: str, before: str, value: str) -> None:
    """Overwrite the mark that this process was started with. Its children inherit the new one.

    The system shows the memory that held the environment of a process when its program started. Setting a variable writes elsewhere, and
    a forked process only has a copy of that memory, from before its mark was known. Raises ValueError if the variable is not `before`, or
    if `value` has another length.
    """
    library = ctypes.CDLL(None)
    library.getenv.restype = ctypes.c_void_p
    place = library.getenv(variable.encode())
    if place is None or len(before) != len(value) or ctypes.string_at(place) != before.encode():
        raise ValueError(f"{variable} is not {before}, or {value!r} is not as long")
    ctypes.memmove(place, value.encode(), len(value))


def marked(variable: str, value: str) -> Iterator[psutil.Process]:
    """Yield the running processes of this user that carry the mark."""
    for process in psutil.process_iter():
        try:
            if _runs(process) and process.environ().get(variable) == value:
                yield process
        except psutil.Error:  # ended meanwhile, or another user's
            continue


def wait_until_ended(processes: Iterable[psutil.Process]) -> None:
    """Wait until all processes have ended. psutil's own wait lasts until they are reaped, which a parent that hangs never does."""
    for process in processes:
        while _runs(process):
            time.sleep(POLL_S)


def end_marked(variable: str, value: str, *, grace_s: float = 0.0) -> int:
    """End the processes that carry the mark and return their number: SIGTERM if `grace_s` is not 0, then SIGKILL.

    Repeats until none is left, because a process can start another one while it is being ended.
    """
    ended = 0
    while processes := list(marked(variable, value)):
        ended += len(processes)
        if grace_s:
            for process in processes:
                _send(process, terminate=True)
            _, processes = psutil.wait_procs(processes, timeout=grace_s)
        for process in processes:
            _send(process, terminate=False)
        psutil.wait_procs(processes, timeout=5)
    return ended


def _runs(process: psutil.Process) -> bool:
    """Return whether the process is running; a zombie is not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, *, terminate: bool) -> None:
    try:
        process.terminate() if terminate else process.kill()
    except psutil.NoSuchProcess:
        return
