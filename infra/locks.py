"""Locks between processes that die with their owner: the kernel's, through filelock; between hosts, leases that run out."""

import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from infra.runpod.pod import SHARED_VARIABLE, lease

POLL_S = 0.5
"""Between two tries to take a lock that another process holds."""
LEASE_S = 120.0
"""After which the owner of a lease that gives no sign is thought dead, with its host."""


@contextmanager
def locked(path: Path, *, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock on `path` (made if it is not there).

    While another process holds it, calls `waiting` before every new try; `waiting` may raise to give up. On a volume that other hosts work
    on too (SHARED_VARIABLE) it is a lease: a host that dies loses it after LEASE_S, and a process that lost it ends itself.
    """
    if os.environ.get(SHARED_VARIABLE):
        with leased(path, waiting=waiting):
            yield
        return

    def go_on() -> bool:
        waiting()
        return False

    with _lock(path).acquire(poll_interval=POLL_S, cancel_check=go_on):
        yield


@contextmanager
def leased(
    path: Path, *, waiting: Callable[[], None] = lambda: None, lease_s: float = LEASE_S, lost: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold `path` against every process on every host that sees the file system; `waiting` as in `locked`.

    `lost` is called where another took the lease; by default this process gets SIGTERM, since what it writes is another's now.
    """
    owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    while True:
        with lease(f"{path}.lease", owner, lease_s, lost or (lambda: os.kill(os.getpid(), signal.SIGTERM))) as held:
            if held:
                yield
                return
        waiting()
        threading.Event().wait(min(POLL_S, lease_s / 4))


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
