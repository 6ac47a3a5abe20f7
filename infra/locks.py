"""Locks between processes that die with their owner: the kernel's, through filelock; between hosts, leases that run out."""

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
"""Between two tries to take a lock that another process holds."""
LEASE_S = 120.0
"""After which the owner of a lease that gives no sign is thought dead, with its host."""


class Lock(Protocol):
    """A lock that is held."""

    def release(self) -> None:
        """Let go."""
        ...


@contextmanager
def locked(path: Path, *, waiting: Callable[[], None] = lambda: None) -> Generator[None]:
    """Hold an exclusive lock on `path` (made if it is not there).

    While another process holds it, calls `waiting` before every new try; `waiting` may raise to give up. On a volume that other hosts work
    on too (SHARED_VARIABLE) it is a lease: a host that dies loses it after LEASE_S, and a process that lost it ends itself.
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
    """Hold `path` against every process on every host that sees the file system; `waiting` as in `locked`.

    `lost` is called where another took the lease; by default this process gets SIGTERM, since what it writes is another's now.
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
    """Take the lock for the rest of this process's life, or until it is released; None if another process has it.

    A lease, as in `locked`, where other hosts work on the volume.
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
    """Of a lease: unique in all the world."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def _end_self() -> None:
    """What this process writes is another's now."""
    os.kill(os.getpid(), signal.SIGTERM)


def _lock(path: Path) -> FileLock:
    """Without filelock's substitute for file systems that have no locks: it outlives a process that was killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, thread_local=False, fallback_to_soft=False)
