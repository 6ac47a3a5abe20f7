"""Runs one command and makes sure that nothing it started outlives it, or outlives whoever asked for it.

`python guard.py PARENT_PID GRACE_S COMMAND...`. The guard asks the kernel for a signal (SIGTERM) when its parent dies, and to adopt
orphaned descendants, whatever session they moved to: torchrun puts each of its processes in a session of its own, so
neither a process group nor a session would reach them. When the command ends, or the guard gets a signal to stop, every
descendant is killed before the guard leaves. Only the standard library, so that it starts in milliseconds.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def main(parent: int, grace_s: float, command: list[str]) -> int:
    """Run the command to its end. Returns its exit status, 128 + N if signal N ended it."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:  # it died before the kernel was asked
        return 128 + signal.SIGTERM
    stopping = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    child = subprocess.Popen(command, start_new_session=True, preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM))
    told_at: float | None = None
    while child.poll() is None:
        if stopping and told_at is None:
            child.terminate()
            told_at = time.monotonic()
        if told_at is not None and time.monotonic() - told_at > grace_s:
            child.kill()
        time.sleep(0.05)
    kill_descendants()
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


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
