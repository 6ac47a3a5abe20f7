"""Wall-clock time, machine time and price of every phase."""

from fvlm_core.manifest import Manifest
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.formatting import duration
from fvlm_core.release.report import Section
from fvlm_core.tables import Table

MACHINE = "Machine time is the sum of the jobs' own times."
WALL = "Wall time is that of the run that finished the phase: it includes start-up and queueing, but not earlier, interrupted runs."


def section(evidence: Evidence, figures: Figures) -> Section:
    price, steps = evidence.job.usd_per_hour, dict(evidence.manifests)
    lines: list[tuple[str, float | None, float, str]] = []
    for name, phase in evidence.phases.items():
        own: list[Manifest] = [steps.pop(step) for step in phase.steps if step in steps]
        lines.append((name, phase.seconds, sum(one.seconds for one in own), f"{len(own)} step{'s' if len(own) != 1 else ''}"))
    lines += [(name, None, manifest.seconds, "1 step") for name, manifest in steps.items()]
    wall = sum(seconds for _, seconds, _, _ in lines if seconds is not None) if evidence.phases else None
    lines.append(("all", wall, sum(seconds for _, _, seconds, _ in lines), ""))
    rows = [
        [name, *([] if not evidence.phases else ["" if wall is None else duration(wall)]), duration(machine), of]
        + ([] if price is None else [f"{machine / 3600 * price:.2f}"])
        for name, wall, machine, of in lines
    ]
    head = ["phase", "wall time"] if evidence.phases else ["step"]
    note = f"{MACHINE} {WALL}" if evidence.phases else MACHINE
    if price is not None:
        note += f" At {price:.2f} USD per hour of machine time."
    head += ["machine time", "of"] + (["USD"] if price is not None else [])
    return Section(title="Time and cost", blocks=[Table(head=head, rows=rows, marked=[len(rows) - 1], note=note)])
