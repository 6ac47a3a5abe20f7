"""Compares plan and bill step by step: what was planned before anything was rented, and what each step has cost.

RunPod bills pods. A pod works for one phase, so the phase's bill is divided among its steps by their durations, which are in their
manifests. The rest is the pod's own time: its start, its environment, its end. The plan is written to the volume when a pipeline run
starts. This module does not depend on Prefect, and reads everything through a store, so it works on a pod and on the user's machine.
"""

import time
from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from fvlm_core.manifest import FILE_NAME, AnyManifest
from fvlm_core.settings import Settings
from fvlm_core.tables import Table
from infra.budget import HOUR_S, SERVER, Entry, usd_text
from infra.store import Store
from tasks.dollars import SERVES, STARTS, WAITING, DollarPlan, Line, planned_text
from tasks.phase import PHASES_FOLDER, PhaseManifest

PLANS = "budget/plans"
"""Folder of the volume with the plan of each pipeline run."""
UNFINISHED = "not finished"
NO_STEPS = {"pipeline": WAITING, SERVER: SERVES, "storage": "storage"}
"""Costs without steps, by phase, and their names in the plan."""


class Bill(Settings):
    """USD by phase and step."""

    usd: dict[str, dict[str, float]]

    @property
    def total(self) -> float:
        """Total of all phases and steps."""
        return sum(sum(steps.values()) for steps in self.usd.values())


def record_plan(store: Store, planned: DollarPlan, *, now: float | None = None) -> None:
    """Write the plan of a run to the volume, unless the plan is empty."""
    if planned.lines:
        moment = time.time() if now is None else now
        store.write(f"{PLANS}/{moment:.0f}.json", planned.model_dump_json().encode())


def recorded_plan(store: Store) -> DollarPlan | None:
    """Return the first plan of each step. A run that resumes after a failure plans its remaining steps again."""
    plans = []
    for key in store.keys(f"{PLANS}/"):
        try:
            plans.append(DollarPlan.model_validate_json(store.read(key) or b""))
        except ValidationError:
            continue
    if not plans:
        return None
    lines: dict[tuple[str, str], Line] = {}
    for line in (line for one in plans for line in one.lines):
        lines.setdefault((line.phase, line.what if line.phase != "storage" else ""), line)
    return plans[0].model_copy(update={"lines": list(lines.values())})


def billed_by_step(store: Store, paid: Mapping[str, Sequence[Entry]], now: float) -> Bill:
    """Divide the ledger's amounts (`paid`, by phase) among the steps."""
    manifests = finished_phases(store)
    usd: dict[str, dict[str, float]] = {}
    for phase, entries in paid.items():
        amount = sum(entry.spent(now) for entry in entries)
        hours = sum((entry.ended if entry.ended is not None else now) - entry.since for entry in entries) / HOUR_S
        manifest = manifests.get(phase)
        if phase in NO_STEPS:
            usd[phase] = {NO_STEPS[phase]: amount}
        elif manifest is None or not hours:
            usd[phase] = {UNFINISHED: amount}
        else:
            seconds = {name: step_seconds(store, made.folder) for name, made in manifest.steps.items()}
            total = sum(seconds.values()) or 1.0
            # with several pods, the time of the phase's last run includes neither its helpers nor lost runs; the times of its steps do
            busy = manifest.seconds if len(entries) == 1 else max(manifest.seconds, total)
            worked = amount * min(1.0, busy / HOUR_S / hours)
            shares = {name: worked * taken / total for name, taken in seconds.items()}
            usd[phase] = {STARTS: amount - sum(shares.values()), **shares}
    return Bill(usd=usd)


def finished_phases(store: Store) -> dict[str, PhaseManifest]:
    """Return the newest manifest of each phase, by name."""
    found: dict[str, PhaseManifest] = {}
    for key in store.keys(f"{PHASES_FOLDER}/"):
        if not key.endswith(f"/{FILE_NAME}"):
            continue
        try:
            manifest = PhaseManifest.model_validate_json(store.read(key) or b"")
        except ValidationError:
            continue
        if manifest.name not in found or found[manifest.name].created_at < manifest.created_at:
            found[manifest.name] = manifest
    return found


def step_seconds(store: Store, folder: str) -> float:
    """Return how long a step took according to its manifest, or 0 if it cannot be read."""
    try:
        return AnyManifest.model_validate_json(store.read(f"{folder}/{FILE_NAME}") or b"").seconds
    except ValidationError:
        return 0.0


def bill_against_plan(planned: DollarPlan, bill: Bill) -> Table:
    """Return plan and bill side by side: a row for each step, each phase, and the total."""
    rows, marked = [], []
    for phase in dict.fromkeys([*(line.phase for line in planned.lines), *bill.usd]):
        lines = {line.what if phase != "storage" else phase: line for line in planned.lines if line.phase == phase}
        paid = bill.usd.get(phase, {})
        names = dict.fromkeys([*lines, *paid])
        for name in names if len(names) > 1 else ():
            rows.append([phase, name, *_compared([lines[name]] if name in lines else [], paid.get(name, 0.0))])
        marked.append(len(rows))
        rows.append([phase, "all of it", *_compared(planned.lines_of(phase), sum(paid.values()))])
    marked.append(len(rows))
    rows.append(["total", "", *_compared(planned.lines, bill.total)])
    return Table(title="Plan against bill", head=["phase", "step", "planned", "billed", "difference"], rows=rows, marked=marked)


def _compared(lines: Sequence[Line], paid: float) -> list[str]:
    """Return the cells of planned, billed and difference. A plan of which a part is not known has no difference from the bill."""
    planned = sum(line.usd.value for line in lines)
    known = planned > 0 and all(line.complete for line in lines)
    return [planned_text(lines), usd_text(paid), _off(planned, paid) if known else ""]


def _off(planned: float, paid: float) -> str:
    """Return by how many percent the bill differs from the plan; from ten times the plan on, their ratio."""
    return f"{paid / planned - 1:+.0%}" if paid < 10 * planned else f"x {paid / planned:,.0f}"
