"""Marks on processes: an environment variable that says whose they are, so that leftovers are found and nothing else is."""

import ctypes
import hashlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

STACK_VARIABLE = "FVLM_STACK"
"""Server, workers and flow runs of one volume's local stack."""
JOB_VARIABLE = "FVLM_JOB"
"""The job that fills one folder."""
UNMARKED = "0" * 16
"""The mark of a process that has none yet, in whose place `change_mark` can write one."""
POLL_S = 0.05


def mark(folder: Path) -> str:
    """The value that marks processes working on `folder`."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


def change_mark(variable: str, before: str, value: str) -> None:
    """Change the mark that this process was started with and that its children will have.

    What the system shows of a process is the memory that held its environment when its program began. Setting a variable writes
    somewhere else; a fork has a copy of that memory, and its program began before anyone knew the mark.
    """
    library = ctypes.CDLL(None)
    library.getenv.restype = ctypes.c_void_p
    place = library.getenv(variable.encode())
    if place is None or len(before) != len(value) or ctypes.string_at(place) != before.encode():
        raise ValueError(f"{variable} is not {before}, or {value!r} is not as long")
    ctypes.memmove(place, value.encode(), len(value))


def marked(variable: str, value: str) -> Iterator[psutil.Process]:
    """Living processes of this user that carry the mark."""
    for process in psutil.process_iter():
        try:
            if _runs(process) and process.environ().get(variable) == value:
                yield process
        except psutil.Error:  # ended meanwhile, or another user's
            continue


def wait_until_ended(processes: Iterable[psutil.Process]) -> None:
    """Return when none of them runs. psutil's own wait goes on until somebody reaps them, which a parent that hangs never does."""
    for process in processes:
        while _runs(process):
            time.sleep(POLL_S)


def end_marked(variable: str, value: str, *, grace_s: float = 0.0) -> int:
    """End the processes that carry the mark: SIGTERM where there is a grace, then SIGKILL. Returns how many there were.

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
    """Whether it has not ended; one that has, and is not reaped, has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, *, terminate: bool) -> None:
    try:
        process.terminate() if terminate else process.kill()
    except psutil.NoSuchProcess:
        return
