"""A pod's container as a local process, with its own root-like folder, the environment that RunPod injects, and restarts when its command
ends.

It never outlives the emulator, because the command runs under `infra/guard.py`.
"""

import contextlib
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from infra import guard

STOP_GRACE_S = 5.0
"""Time between SIGTERM and SIGKILL when a pod is stopped."""
FULL_BYTES = 2048
"""Largest file that a container with a full disk can still write."""
DISK_LOOK_S = 1.0
NVIDIA_SMI = """#!/bin/sh
i=0; while [ $i -lt {count} ]; do echo "{name}, 570.00, 81920"; i=$((i + 1)); done
"""
"""A stand-in for nvidia-smi that answers the query of the pod's preflight: name, driver and memory in MiB of each GPU."""


@dataclass(frozen=True)
class Line:
    """A line of a pod's log."""

    source: str
    line: str
    ts: str
    id: str


class Log:
    """The log of a pod, with any number of concurrent readers."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.changed = threading.Condition()
        self.closed = False

    def add(self, source: str, text: str) -> None:
        """Append a line."""
        ts = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        with self.changed:
            self.lines.append(Line(source, text, ts, f"{ts}/{len(self.lines):012d}"))
            self.changed.notify_all()

    def close(self) -> None:
        """End the log: no more lines will be added."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def after(self, event: str | None, tail: int) -> int:
        """Return the index of the first line for a reader who has seen `event`, or who wants the last `tail` lines."""
        with self.changed:
            if event:
                return next((number + 1 for number, line in enumerate(self.lines) if line.id == event), 0)
            return max(0, len(self.lines) - tail)

    def wait(self, number: int, timeout_s: float) -> Line | None:
        """Wait for the line with this index. Returns None after `timeout_s` seconds, or if the log has ended before it."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.lines) > number or self.closed, timeout_s)
            return self.lines[number] if len(self.lines) > number else None


class Container:
    """The process of a pod. `run` starts it, and restarts it until `stop` is called."""

    def __init__(self, root: Path, command: str, environment: Mapping[str, str], *, gpu: tuple[str, int] | None, disk_gb: int) -> None:
        self.root, self.command, self.disk_gb, self.log = root, command, disk_gb, Log()
        self.disk_full = False
        self.starts = 0
        self.started_at: float | None = None
        """When the running command was started, on the monotonic clock."""
        self._process: subprocess.Popen[bytes] | None = None
        self._over = threading.Event()
        for folder in ("root", "tmp", "bin"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        if gpu:
            program = root / "bin" / "nvidia-smi"
            program.write_text(NVIDIA_SMI.format(name=gpu[0], count=gpu[1]))
            program.chmod(0o755)
        python = str(Path(sys.executable).parent)
        path = os.pathsep.join([str(root / "bin"), python, os.environ.get("PATH", os.defpath)])
        self.environment = {"PATH": path, "HOME": str(root / "root"), "TMPDIR": str(root / "tmp"), "LANG": "C.UTF-8", **environment}

    def run(self, restart_s: float) -> None:
        """Run the command, and restart it whenever it ends, until `stop` is called."""
        while not self._over.is_set():
            self._once()
            if self._over.is_set():
                break
            self.log.add("system", f"the container's command ended with status {self._status}; it is started again")
            self._over.wait(restart_s)
            for scratch in ("root", "tmp"):  # the disk is wiped at a restart
                shutil.rmtree(self.root / scratch, ignore_errors=True)
                (self.root / scratch).mkdir(parents=True, exist_ok=True)
        self.log.close()

    def stop(self, *, grace_s: float = STOP_GRACE_S) -> None:
        """End the command and do not restart it."""
        self._over.set()
        process = self._process
        if process is None or process.poll() is not None:
            return
        self.resume()
        process.terminate()
        try:
            process.wait(grace_s + 2)
        except subprocess.TimeoutExpired:
            process.kill()

    def kill(self) -> None:
        """Kill the command at once and do not restart it, as if the machine had crashed."""
        self._over.set()
        for process in reversed(self._family()):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def restart(self) -> None:
        """Kill the command; `run` then restarts it."""
        for process in self._family()[1:]:
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                process.kill()

    def pause(self) -> None:
        """Suspend all processes of the container."""
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                process.suspend()

    def resume(self) -> None:
        """Resume all processes of the container."""
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                process.resume()

    @property
    def uptime_s(self) -> int:
        """Seconds since the command was last started."""
        return 0 if self.started_at is None else int(time.monotonic() - self.started_at)

    def _once(self) -> None:
        limit = FULL_BYTES if self.disk_full else resource.RLIM_INFINITY
        guarded = [sys.executable, "-S", "-E", guard.__file__, str(os.getpid()), str(STOP_GRACE_S), *shlex.split(self.command)]
        self._process = subprocess.Popen(
            guarded,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=self.root,
            env=self.environment,
            start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
        )
        self.starts, self.started_at = self.starts + 1, time.monotonic()
        reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        reader.start()
        looked = time.monotonic()
        while self._process.poll() is None:
            if self._over.wait(0.05):
                break
            if time.monotonic() - looked > DISK_LOOK_S:
                looked = time.monotonic()
                if _bytes(self.root) > self.disk_gb * 10**9:
                    self.log.add("system", f"the container's disk of {self.disk_gb} GB is full")
                    self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_GRACE_S + 5)
        self._status = self._process.returncode
        reader.join(STOP_GRACE_S)

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.log.add("container", line.decode(errors="replace").rstrip("\n"))

    def _family(self) -> list[psutil.Process]:
        """Return the guard and all of its descendants."""
        if self._process is None:
            return []
        try:
            guarding = psutil.Process(self._process.pid)
            return [guarding, *guarding.children(recursive=True)]
        except psutil.Error:
            return []


def _bytes(folder: Path) -> int:
    """Size of the files in a folder; links are not followed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total
