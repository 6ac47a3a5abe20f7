"""Progress of a job in a small JSON file that its launcher can watch, without network or orchestration."""

import time
from pathlib import Path
from typing import Self

from fvlm_core.manifest import write_atomically
from fvlm_core.settings import Settings

FILE_NAME = "progress.json"


class ProgressReport(Settings):
    """The state of a job at one moment."""

    step: int
    total: int
    loss: float | None = None
    note: str = ""
    elapsed_s: float = 0.0
    remaining_s: float | None = None

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The last report of the job in `folder`; None if there is no valid one."""
        try:
            return cls.model_validate_json((folder / FILE_NAME).read_text())
        except (FileNotFoundError, ValueError):
            return None


class Progress:
    """Writes `progress.json` into a job's folder, at most every `interval_s` seconds; the last step is always written."""

    def __init__(self, folder: Path, total: int, *, first_step: int = 0, interval_s: float = 0.5) -> None:
        self.folder, self.total, self.interval_s = folder, total, interval_s
        self.first_step, self.started, self.written = first_step, time.monotonic(), 0.0
        self.step = first_step

    def update(self, step: int, *, loss: float | None = None, note: str = "") -> None:
        """Report that `step` of `total` is done."""
        self.step = step
        now = time.monotonic()
        if step < self.total and now - self.written < self.interval_s:
            return
        self.written, elapsed = now, now - self.started
        done = step - self.first_step
        remaining = elapsed / done * (self.total - step) if done > 0 else None
        report = ProgressReport(step=step, total=self.total, loss=loss, note=note, elapsed_s=elapsed, remaining_s=remaining)
        write_atomically(self.folder / FILE_NAME, report.model_dump_json().encode())

    def say(self, note: str) -> None:
        """Update the note without advancing the step."""
        self.update(self.step, note=note)
