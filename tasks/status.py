"""How far a phase is: a small file on the volume for whoever watches, and a progress artifact in the UI."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from pydantic import Field, ValidationError

from fvlm_core.manifest import write_atomically
from fvlm_core.progress import ProgressReport
from fvlm_core.settings import Settings

FILE_NAME = "status.json"


class PhaseStatus(Settings):
    """A moment of a phase."""

    phase: str
    total: int
    """Steps of the phase."""
    done: int = 0
    running: dict[str, ProgressReport | None] = Field(default_factory=dict)
    """Steps that run now; None until their job reports."""

    @property
    def percent(self) -> float:
        """Share of the phase that is done, in percent, with the running steps' own progress."""
        parts = sum(report.step / report.total for report in self.running.values() if report and report.total)
        return min(100.0, 100 * (self.done + parts) / max(1, self.total))

    def text(self) -> str:
        """A line for a person, e.g. `1 of 3 steps; stage2: 40/120, loss 2.131, 35 s left`."""
        return "; ".join([f"{self.done} of {self.total} steps", *(describe(name, report) for name, report in self.running.items())])

    @classmethod
    def read(cls, folder: Path, *, since: float = 0.0) -> Self | None:
        """The status of the phase in `folder`, or None where there is none written after `since` (seconds since the epoch)."""
        path = folder / FILE_NAME
        try:
            return cls.model_validate_json(path.read_bytes()) if path.stat().st_mtime >= since else None
        except (OSError, ValidationError):
            return None


def describe(name: str, report: ProgressReport | None) -> str:
    """A running step for a person, e.g. `stage2: 40/120, loss 2.131, 35 s left`."""
    if report is None:
        return f"{name}: starting"
    parts = [f"{name}: {report.step}/{report.total}"]
    parts += [f"loss {report.loss:.3f}"] if report.loss is not None else []
    parts += [report.note] if report.note else []
    parts += [f"{report.remaining_s:.0f} s left"] if report.remaining_s is not None else []
    return ", ".join(parts)


class StatusBoard:
    """Keeps a phase's status: in `status.json` at once, in the UI's progress artifact every few seconds. Used by several threads."""

    ARTIFACT_INTERVAL_S = 3.0

    def __init__(self, phase: str, folder: Path, total: int) -> None:
        self.folder, self.status, self.lock = folder, PhaseStatus(phase=phase, total=total), threading.Lock()
        self.succeeded: set[str] = set()
        self.artifact = cast(UUID, create_progress_artifact(0.0, key=f"{phase}-progress", description=self.status.text()))
        self.sent = time.monotonic()
        write_atomically(folder / FILE_NAME, self.status.model_dump_json().encode())

    def running(self, step: str, report: ProgressReport | None) -> None:
        """`step` runs and has got this far."""
        self._change(lambda status: {"running": status.running | {step: report}})

    def ended(self, step: str, *, succeeded: bool) -> None:
        """`step` runs no longer; `succeeded` if it has its result."""

        def change(status: PhaseStatus) -> dict[str, object]:
            self.succeeded |= {step} if succeeded else set()
            return {"running": {name: report for name, report in status.running.items() if name != step}, "done": len(self.succeeded)}

        self._change(change)

    def finish(self) -> None:
        """The phase is done."""
        self._change(lambda status: {"done": status.total, "running": {}}, now=True)

    def _change(self, change: Callable[[PhaseStatus], dict[str, object]], *, now: bool = False) -> None:
        """`change` says what becomes of the status there is then: other threads change it too."""
        with self.lock:
            self.status = self.status.model_copy(update=change(self.status))
            write_atomically(self.folder / FILE_NAME, self.status.model_dump_json().encode())
            if now or time.monotonic() - self.sent > self.ARTIFACT_INTERVAL_S:
                self.sent = time.monotonic()
                update_progress_artifact(self.artifact, self.status.percent, self.status.text())
