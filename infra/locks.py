"""Locks between processes that are released when their owner dies: kernel locks on one host (through filelock), leases across hosts."""

import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from infra.runpod.pod import SHARED_VARIABLE, lease

POLL_S = 0.5
"""Interval between attempts to take a lock that another process holds."""
LEASE_S = 120.0
"""A lease that was not renewed for this long has expired: its owner, and probably its host, is assumed dead."""


class Lock(Protocol):
    """A lock that is held."""

    def release(self) -> None:
        """Release the lock."""
        ...


@contextmanager
def locked(path: Path, *, waiting: Callable[[], None] = lambda: None) -> Generator[None]:
    """Hold an exclusive lock on the file `path`, which is created if missing.

    While another process holds it, `waiting` is called before every new attempt; it may raise to give up. On a volume that other hosts
    also use (SHARED_VARIABLE), the lock is a lease: a dead host loses it after LEASE_S, and a process that loses it ends itself.
    """
    if os.environ.get(SHARED_VARIABLE):
        with leased(path, waiting=waiting, lease_s=LEASE_S):
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
) -> Generator[None]:
    """Hold a lease on `path` that excludes all processes on all hosts of the file system; `waiting` works as in `locked`.

    `lost` is called if another process takes the lease over. By default this process then gets SIGTERM, because it no longer owns the
    files that it writes.
    """
    owner = _owner()
    while True:
        with lease(f"{path}.lease", owner, lease_s, lost or _end_self) as held:
            if held:
                yield
                return
        waiting()
        threading.Event().wait(min(POLL_S, lease_s / 4))


def try_lock(path: Path) -> Lock | None:
    """Take the lock until it is released or this process ends. Returns None if another process holds it.

    As in `locked`, it is a lease if other hosts use the volume.
    """
    if os.environ.get(SHARED_VARIABLE):
        return _HeldLease.take(path)
    lock = _lock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


class _HeldLease:
    """A lease outside of a `with` block."""

    def __init__(self, block: ExitStack) -> None:
        self.block = block

    @classmethod
    def take(cls, path: Path) -> "_HeldLease | None":
        block = ExitStack()
        return cls(block) if block.enter_context(lease(f"{path}.lease", _owner(), LEASE_S, _end_self)) else None

    def release(self) -> None:
        self.block.close()


def _owner() -> str:
    """Return a globally unique name for the owner of a lease."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def _end_self() -> None:
    """End this process, which no longer owns the files that it writes."""
    os.kill(os.getpid(), signal.SIGTERM)


def _lock(path: Path) -> FileLock:
    """A lock without filelock's fallback for file systems that have no locks, which would outlive a killed process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, thread_local=False, fallback_to_soft=False)
