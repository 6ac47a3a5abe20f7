"""One run at a time in a folder: a lock that its process holds as long as it lives, and ranks that end with their launcher.

torchrun puts every rank in a session of its own, so a torchrun that is killed leaves its ranks alive; the same command again
would then write beside them. The kernel sends them a SIGTERM instead (they save and end), and the new run waits for that.

Where other hosts write to the folder's file system too, the lock is a lease: its owner gives signs of life, and a host that died loses it.
"""

import contextlib
import ctypes
import os
import signal
import socket
import time
from collections.abc import Generator, Mapping
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout

from fvlm_core.errors import UserError

LOCK_FILE, LEASE_FILE = ".lock", ".lease"
SHARED_VARIABLE = "FVLM_SHARED_VOLUME"
"""In the environment of a run whose folder other hosts may write to."""
LEASE_S = 120.0
"""After which the owner of a lease that gives no sign is thought dead, with its host."""
ENDING = "ending"
WAIT_S = 10.0
"""How long the folder's holder may take until it is known to be ending: a killed process to be gone, a stopped run to notice."""
ENDING_WAIT_S = 600.0
"""How long one that is ending may take: it saves a checkpoint."""
POLL_S = 0.2
PR_SET_PDEATHSIG = 1


class RunLock:
    """The lock of one run's folder. The lock file names the process that holds it."""

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        """`shared`: other hosts may work in the folder; a process whose lease another host has taken gets SIGTERM."""
        self.folder, self.path = folder, folder / LOCK_FILE
        self.wait_s = WAIT_S + LEASE_S if shared else WAIT_S
        self.lock: BaseFileLock
        if shared:
            self.lock = SoftFileLease(folder / LEASE_FILE, lease_duration=LEASE_S, on_compromise=_end, poll_interval=POLL_S)
        else:
            # without its fall-back for file systems that cannot lock, which would leave a lock behind when its process is killed
            self.lock = FileLock(self.path, fallback_to_soft=False, poll_interval=POLL_S)

    @contextlib.contextmanager
    def held(self) -> Generator[None]:
        """Hold the lock; while a run that is ending holds it, wait. Raises UserError where another run goes on."""
        self._acquire()
        try:
            yield
        finally:
            self.lock.release()

    def ending(self) -> None:
        """Note that the run is about to end and let go. Safe in a signal handler."""
        with contextlib.suppress(OSError):  # a full disk is no reason not to end
            self._write(ENDING)

    def _acquire(self) -> None:
        started = time.monotonic()
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock.acquire(timeout=POLL_S)
                self._write("")
                return
            except Timeout:
                holder, _, note = (self.path.read_text() if self.path.exists() else "a process").partition("\n")
                if time.monotonic() - started > (ENDING_WAIT_S if note == ENDING else self.wait_s):
                    raise UserError(
                        f"another run is at work in this folder: {holder}",
                        where=str(self.folder),
                        fix="wait for it to end, or stop it (kill with its process number; it saves a checkpoint)",
                    ) from None
            except OSError as error:
                raise UserError(
                    f"cannot write: {error}", where=str(self.folder), fix="give an output folder that can be written and locked"
                ) from error

    def _write(self, note: str) -> None:
        self.path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n{note}")


def _end(_loss: object) -> None:
    """The folder is another run's now."""
    os.kill(os.getpid(), signal.SIGTERM)


def end_with_launcher(environment: Mapping[str, str]) -> None:
    """Under torchrun, get a SIGTERM when it dies. A run that was started without it lives on when its shell ends."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGTERM)
