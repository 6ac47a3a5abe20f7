"""Publishes a phase's status: on the volume, and as a progress artifact in Prefect's UI."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from fvlm_core.manifest import write_atomically
from fvlm_core.progress import ProgressReport
from tasks.status import FILE_NAME, PhaseStatus

log = logging.getLogger(__name__)


class StatusBoard:
    """Publishes a phase's status: in `status.json` at once, in the UI's progress artifact every few seconds. Thread-safe."""

    ARTIFACT_INTERVAL_S = 3.0

    def __init__(self, phase: str, folder: Path, total: int) -> None:
        self.folder, self.status, self.lock = folder, PhaseStatus(phase=phase, total=total), threading.Lock()
        self.succeeded: set[str] = set()
        self.artifact = cast(UUID, create_progress_artifact(0.0, key=f"{phase}-progress", description=self.status.text()))
        self.sent = time.monotonic()
        write_atomically(folder / FILE_NAME, self.status.model_dump_json().encode())

    def running(self, step: str, report: ProgressReport | None) -> None:
        """Set the progress of a running step."""
        self._change(lambda status: {"running": status.running | {step: report}})

    def ended(self, step: str, *, succeeded: bool) -> None:
        """Set a step as no longer running; `succeeded` if it has its result."""

        def change(status: PhaseStatus) -> dict[str, object]:
            self.succeeded |= {step} if succeeded else set()
            return {"running": {name: report for name, report in status.running.items() if name != step}, "done": len(self.succeeded)}

        self._change(change)

    def finish(self) -> None:
        """Set the phase as done."""
        self._change(lambda status: {"done": status.total, "running": {}}, now=True)

    def _change(self, change: Callable[[PhaseStatus], dict[str, object]], *, now: bool = False) -> None:
        """Update the status under the lock. `change` gets the status at that time, because other threads change it too."""
        with self.lock:
            self.status = self.status.model_copy(update=change(self.status))
            try:
                write_atomically(self.folder / FILE_NAME, self.status.model_dump_json().encode())
                if now or time.monotonic() - self.sent > self.ARTIFACT_INTERVAL_S:
                    self.sent = time.monotonic()
                    update_progress_artifact(self.artifact, self.status.percent, self.status.text())
            except Exception as error:  # an error of the disk or of Prefect's client must not stop the phase
                log.warning("the status of %s was not shown: %s", self.status.phase, error)
