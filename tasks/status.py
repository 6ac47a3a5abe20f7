"""How far a phase is: a small file on the volume for whoever watches. Nothing in this file knows Prefect."""

from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError

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
