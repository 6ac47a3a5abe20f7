"""`fvlm status`: the progress and results of a profile's phases, read from the volume alone."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fvlm_core.manifest import FILE_NAME as MANIFEST
from fvlm_core.tables import Table
from tasks.config import PipelineConfig
from tasks.phase import Phase, PhaseManifest, current
from tasks.plan import duration, inspect_steps
from tasks.status import PhaseStatus

STALE_S = 60.0
"""A phase whose status was not written for this long is no longer running."""


def status_table(phases: Sequence[Phase], config: PipelineConfig, volume: Path) -> Table:
    """A row per phase: done, running (with the progress of its steps), or not done (with the number of finished steps)."""
    steps: dict[str, list[bool]] = {}
    for one in inspect_steps(phases, config, volume, absent=[] if config.machine.rental else None):
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
            rows.append([phase.name, "done", f"{len(made)} steps", duration(manifest.seconds), manifest.shown.text.partition("\n")[0]])
        elif status:
            rows.append([phase.name, "running", f"{status.done} of {status.total} steps", "", status.text()])
        else:
            rows.append([phase.name, "not done", f"{sum(made)} of {len(made)} steps", "", ""])
    return Table(title=f"{config.name} on {volume}", head=["phase", "state", "steps", "took", ""], rows=rows)


def print_results(phases: Sequence[Phase], config: PipelineConfig, volume: Path, console: Console, *, away: bool = False) -> None:
    """Print the phases' closing tables and output files. `away`: the files are on a volume that is not mounted here."""
    folders = [phase.folder(config, volume) for phase in phases]
    manifests = [PhaseManifest.read(folder) for folder in folders if (folder / MANIFEST).is_file()]
    for table in (table for manifest in manifests for table in manifest.shown.closing):
        console.print(table.terminal())
    for name, path in ((name, path) for manifest in manifests for name, path in manifest.shown.outputs.items()):
        console.print(f"{name:<7} {f'fvlm volume get {path}' if away else volume / path}", highlight=False, markup=False, soft_wrap=True)


def _running(folder: Path) -> PhaseStatus | None:
    """The status of a running phase, which rewrites it about every second while a step works; else None."""
    status = PhaseStatus.read(folder, since=time.time() - STALE_S)
    return status if status and status.done < status.total else None
