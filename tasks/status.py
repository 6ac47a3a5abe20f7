"""The progress of a phase, in a small file on the volume. This module does not depend on Prefect."""

from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError

from fvlm_core.progress import ProgressReport
from fvlm_core.settings import Settings

FILE_NAME = "status.json"


class PhaseStatus(Settings):
    """The progress of a phase at one moment."""

    phase: str
    total: int
    """Steps of the phase."""
    done: int = 0
    running: dict[str, ProgressReport | None] = Field(default_factory=dict)
    """Progress of the steps that are running; None until their job reports."""

    @property
    def percent(self) -> float:
        """Share of the phase that is done, in percent, including the progress of running steps."""
        parts = sum(report.step / report.total for report in self.running.values() if report and report.total)
        return min(100.0, 100 * (self.done + parts) / max(1, self.total))

    def text(self) -> str:
        """Return the progress as a line of text, e.g. `1 of 3 steps; stage2: 40/120, loss 2.131, 35 s left`."""
        return "; ".join([f"{self.done} of {self.total} steps", *(describe(name, report) for name, report in self.running.items())])

    @classmethod
    def read(cls, folder: Path, *, since: float = 0.0) -> Self | None:
        """Return the status of the phase in `folder`, or None if none was written since `since` (seconds since the epoch)."""
        path = folder / FILE_NAME
        try:
            return cls.model_validate_json(path.read_bytes()) if path.stat().st_mtime >= since else None
        except (OSError, ValidationError):
            return None


def describe(name: str, report: ProgressReport | None) -> str:
    """Return the progress of a running step as text, e.g. `stage2: 40/120, loss 2.131, 35 s left`."""
    if report is None:
        return f"{name}: starting"
    parts = [f"{name}: {report.step}/{report.total}"]
    parts += [f"loss {report.loss:.3f}"] if report.loss is not None else []
    parts += [report.note] if report.note else []
    parts += [f"{report.remaining_s:.0f} s left"] if report.remaining_s is not None else []
    return ", ".join(parts)
