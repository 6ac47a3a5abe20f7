"""Locks between processes that die with their owner: the kernel's, through filelock."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

POLL_S = 0.5
"""Between two tries to take a lock that another process holds."""


@contextmanager
def locked(path: Path, *, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock on `path` (made if it is not there).

    While another process holds it, calls `waiting` before every new try; `waiting` may raise to give up.
    """

    def go_on() -> bool:
        waiting()
        return False

    with _lock(path).acquire(poll_interval=POLL_S, cancel_check=go_on):
        yield


def try_lock(path: Path) -> FileLock | None:
    """Take the lock for the rest of this process's life, or until it is released; None if another process has it."""
    lock = _lock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def _lock(path: Path) -> FileLock:
    """Without filelock's substitute for file systems that have no locks: it outlives a process that was killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, thread_local=False, fallback_to_soft=False)
