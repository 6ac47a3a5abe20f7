"""`fvlm status`: how far the phases of a profile are on a volume, read from the volume alone."""

import time
from collections.abc import Sequence
from pathlib import Path

from fvlm_core.tables import Table
from tasks.config import PipelineConfig
from tasks.phase import Phase, PhaseManifest, current
from tasks.plan import duration, look
from tasks.status import FILE_NAME, PhaseStatus

STALE_S = 60.0
"""A status that was not written for so long is of a phase that runs no longer."""


def status_table(phases: Sequence[Phase], config: PipelineConfig, volume: Path) -> Table:
    """A line per phase: done, running with what its steps do, or how many of its steps are there."""
    steps: dict[str, list[bool]] = {}
    for one in look(phases, config, volume):
        steps.setdefault(one.phase, []).append(one.found.made is not None)
    done: dict[str, PhaseManifest] = {}
    rows = []
    for phase in phases:
        quick = config.model_copy(update={"machine": config.machine.model_copy(update={"verify": "sizes"})})
        manifest = current(phase, quick, volume, done=done) if all(one.name in done for one in phase.after) else None
        made = steps[phase.name]
        status = _running(phase.folder(config, volume))
        if manifest:
            done[phase.name] = manifest
            rows.append([phase.name, "done", f"{len(made)} steps", duration(manifest.seconds), manifest.shown.text.splitlines()[0]])
        elif status:
            rows.append([phase.name, "running", f"{status.done} of {status.total} steps", "", status.text()])
        else:
            rows.append([phase.name, "not done", f"{sum(made)} of {len(made)} steps", "", ""])
    return Table(title=f"{config.name} on {volume}", head=["phase", "state", "steps", "took", ""], rows=rows)


def _running(folder: Path) -> PhaseStatus | None:
    """The status of a phase that runs now: its board is rewritten every second or so while a step works."""
    status = PhaseStatus.read(folder, since=time.time() - STALE_S)
    return status if status and (folder / FILE_NAME).exists() and status.done < status.total else None
