"""Allow one run at a time per folder with a lock that is held until the process exits, and end ranks together with their launcher.

torchrun starts each rank in its own session, so ranks survive if torchrun is killed, and a restarted run would write to the same folder.
Therefore the kernel sends the ranks a SIGTERM when torchrun dies; they save a checkpoint and exit, and the new run waits for that.

If other hosts write to the same file system, the lock is a lease: its owner renews it, and loses it if its host dies.
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

from fvlm_core.errors import FolderTakenError, UserError
from fvlm_core.folder_lock import LOCK_FILE

LEASE_FILE = ".lease"
SHARED_VARIABLE = "FVLM_SHARED_VOLUME"
"""Environment variable, set for a run whose folder other hosts may write to."""
LEASE_S = 120.0
"""Seconds without renewal after which the owner of a lease is considered dead."""
ENDING = "ending"
WAIT_S = 10.0
"""Seconds to wait for a holder that is not known to be ending: a killed process may still exit, a stopped run may still react."""
ENDING_WAIT_S = 600.0
"""Seconds to wait for a holder that is ending, because it saves a checkpoint."""
POLL_S = 0.2
PR_SET_PDEATHSIG = 1


class RunLock:
    """The lock of a run's folder. The lock file names the process that holds it."""

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        """`shared`: other hosts may use the folder. A process that loses its lease to another host gets a SIGTERM."""
        self.folder, self.path = folder, folder / LOCK_FILE
        self.wait_s = WAIT_S + LEASE_S if shared else WAIT_S
        self.lock: BaseFileLock
        if shared:
            self.lock = SoftFileLease(folder / LEASE_FILE, lease_duration=LEASE_S, on_compromise=_end, poll_interval=POLL_S)
        else:
            # no fallback to a soft lock on file systems without locking: a killed process would leave it behind
            self.lock = FileLock(self.path, fallback_to_soft=False, poll_interval=POLL_S)

    @contextlib.contextmanager
    def held(self) -> Generator[None]:
        """Hold the lock. Waits for a run that is ending; raises FolderTakenError if another run continues to hold it."""
        self._acquire()
        try:
            yield
        finally:
            self.lock.release()

    def ending(self) -> None:
        """Record in the lock file that the run is ending. Safe to call in a signal handler."""
        with contextlib.suppress(OSError):  # e.g. a full disk must not prevent the end
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
                    raise FolderTakenError(
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
    """Stop this process: another run has taken the lease."""
    os.kill(os.getpid(), signal.SIGTERM)


def end_with_launcher(environment: Mapping[str, str]) -> None:
    """Under torchrun, request a SIGTERM when torchrun dies. Without torchrun, a run survives the end of its shell."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it died before `prctl` was called
        os.kill(os.getpid(), signal.SIGTERM)
