"""Runs one command and makes sure that nothing it started outlives it, or outlives the process that requested it.

`python guard.py PARENT_PID GRACE_S COMMAND...`. The guard asks the kernel for a SIGTERM when its parent dies, and to become the parent of
orphaned descendants in any session: torchrun puts each of its processes in its own session, so neither a process group nor a session
would reach them. When the command ends, or the guard gets a signal to stop, every descendant is killed before the guard exits. It uses
only the standard library, so that it starts in milliseconds.

Its process is named `NAME`, because guards made by `fork_server.py` have no command line of their own.
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
    """A forked child process, with the part of the `subprocess.Popen` interface that a guard needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        """Return its exit status, -N if signal N ended it, or None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def terminate(self) -> None:
        """Send SIGTERM."""
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)


class Guard:
    """Makes this process the guard of one child, which must be started afterwards."""

    def __init__(self, parent: int) -> None:
        """`parent` is the id of the process that requested the child. Exits if that process has already died."""
        self.stopping = False
        for number in STOPPING:
            signal.signal(number, self._stop)
        set_name(NAME)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        end_with(parent)

    def watch(self, child: subprocess.Popen[bytes] | Forked, grace_s: float) -> int:
        """Wait for the child to end, then kill its descendants. Returns its exit status, 128 + N if signal N ended it.

        When the guard is told to stop, the child gets SIGTERM, and SIGKILL after `grace_s` seconds.
        """
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
    """Set the name of this process as shown by `ps -o comm` and `top`; at most 15 characters. Forked children inherit it."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())


def end_with(parent: int) -> None:
    """Have the kernel send SIGTERM to this process when its parent dies. Exits at once if `parent` has already died."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call above
        os._exit(128 + signal.SIGTERM)


def kill_descendants() -> None:
    """Send SIGKILL to our children until none are left: their orphaned children become ours and are killed in turn."""
    while True:
        for pid in _children(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children(pid: int) -> list[int]:
    """Return the ids of the children of `pid`, including those that have not been reaped."""
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
