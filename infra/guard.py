"""Runs one command and makes sure that nothing it started outlives it, or outlives whoever asked for it.

`python guard.py PARENT_PID GRACE_S COMMAND...`. The guard asks the kernel for a signal (SIGTERM) when its parent dies, and to adopt
orphaned descendants, whatever session they moved to: torchrun puts each of its processes in a session of its own, so
neither a process group nor a session would reach them. When the command ends, or the guard gets a signal to stop, every
descendant is killed before the guard leaves. Only the standard library, so that it starts in milliseconds.

Its process is called `NAME`, whatever command line it has (`fork_server.py` makes guards without one of their own).
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
NAME = "fvlm-guard"
STOPPING = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
POLL_S = 0.05


class Forked:
    """A child made by fork alone, with as much of `subprocess.Popen` as a guard needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        """Its exit status once it has ended, -N where signal N ended it."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def terminate(self) -> None:
        """Ask it to end."""
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        os.kill(self.pid, signal.SIGKILL)


class Guard:
    """This process as the guard of one child, which is made after it."""

    def __init__(self, parent: int) -> None:
        """`parent` is the process that asked for the child. Ends this process where it has died."""
        self.stopping = False
        for number in STOPPING:
            signal.signal(number, self._stop)
        set_name(NAME)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        end_with(parent)

    def watch(self, child: subprocess.Popen[bytes] | Forked, grace_s: float) -> int:
        """See the child to its end. Returns its exit status, 128 + N if signal N ended it."""
        asked_at: float | None = None
        while (status := child.poll()) is None:
            if self.stopping and asked_at is None:
                child.terminate()
                asked_at = time.monotonic()
            if asked_at is not None and time.monotonic() - asked_at > grace_s:
                child.kill()
            time.sleep(POLL_S)
        kill_descendants()
        return status if status >= 0 else 128 - status

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        self.stopping = True


def main(parent: int, grace_s: float, command: list[str]) -> int:
    """Run the command to its end. Returns its exit status, 128 + N if signal N ended it."""
    guard, own = Guard(parent), os.getpid()
    return guard.watch(subprocess.Popen(command, start_new_session=True, preexec_fn=lambda: end_with(own)), grace_s)


def set_name(name: str) -> None:
    """Name this process, as `ps -o comm` and `top` show it; at most 15 letters. Its forks are called the same."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())


def end_with(parent: int) -> None:
    """Get a SIGTERM when the process dies that made this one; leave at once where it has died already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # before the kernel was asked
        os._exit(128 + signal.SIGTERM)


def kill_descendants() -> None:
    """SIGKILL our children until there are none: the orphans of each generation become our children and follow."""
    while True:
        for pid in _children(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children(pid: int) -> list[int]:
    """Process ids whose parent is `pid` (not yet reaped ones too)."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as stream:
                    parent = int(stream.read().rpartition(")")[2].split()[1])
            except OSError:  # it ended meanwhile
                continue
            if parent == pid:
                found.append(int(name))
    return found


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
