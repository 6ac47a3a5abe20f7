"""A plan in dollars: hours on rented machines and their price, the volume's storage, and the steps that would not start because of the cap.

The hours of a training step come from measurements on the volume or, without any, from its FLOPs and an assumed share of the GPUs' peak
(MFU), with an interval. While the grid has not chosen the model's size, the largest is assumed. The hours of other steps are stated in the
profile (`machine.rental.assumed.hours`) until one has run. This module does not depend on Prefect or RunPod.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from pydantic import Field

from fvlm_core.settings import Settings
from fvlm_core.tables import Table
from infra.budget import SERVER, limit_text, usd_text
from tasks.phase import Phase
from tasks.plan import RECIPES, Plan, StepPlan, duration
from tasks.rental import Rental

MEASURED_SPREAD = 0.10
"""The interval of measured hours is 10 % to both sides."""
STATED_SPREAD = 0.50
STORAGE_PER_GB_MONTH, LARGE_STORAGE_PER_GB_MONTH, SMALL_GB = 0.07, 0.05, 1000
"""USD (docs.runpod.io, August 2026): up to the first terabyte, and above it."""
DAYS_PER_MONTH = 30.4
STARTS, WAITING, SERVES = "pod starts, environment", "the flow that waits for the phases", "the Prefect server's pod"
"""Lines of a plan that are not steps."""
NOT_KNOWN = "not known"


class Usd(Settings):
    """An amount with its interval."""

    low: float = 0.0
    value: float = 0.0
    high: float = 0.0

    def __add__(self, other: "Usd") -> "Usd":
        return Usd(low=self.low + other.low, value=self.value + other.value, high=self.high + other.high)

    def times(self, factor: float) -> "Usd":
        """Return the amount and its interval multiplied by `factor`."""
        return Usd(low=self.low * factor, value=self.value * factor, high=self.high * factor)

    def text(self) -> str:
        """E.g. `$12.30 [$8.10, $20.50]`."""
        return usd_text(self.value) if self.low == self.high else f"{usd_text(self.value)} [{usd_text(self.low)}, {usd_text(self.high)}]"


class Line(Settings):
    """One line of the plan."""

    phase: str
    what: str
    """A step, or the pod's own time."""
    because: str = ""
    flops: float | None = None
    hours: Usd = Usd()
    """Hours of the pod, with an interval (not USD)."""
    usd: Usd = Usd()
    basis: str = ""
    """Where the hours come from."""
    complete: bool = True
    """False if the hours, or a part of them, are not known; `hours` and `usd` are then those of the known part."""


def planned_text(lines: Iterable[Line]) -> str:
    """Return the cost of lines as text: with its interval or, if a part is not known, without one: `$12.30 + not known`."""
    lines = list(lines)
    usd = sum((line.usd for line in lines), Usd())
    if all(line.complete for line in lines):
        return usd.text()
    return f"{usd_text(usd.value)} + {NOT_KNOWN}" if usd.value else NOT_KNOWN


class DollarPlan(Settings):
    """A complete plan in dollars."""

    lines: list[Line]
    cap_usd: float
    reserve_usd: float
    dropped: list[str] = Field(default_factory=list)
    """Steps that would not start because of the cap, at the expected costs."""
    at_risk: list[str] = Field(default_factory=list)
    """Steps that would not start because of the cap, at the upper ends of the intervals."""
    unknown: list[str] = Field(default_factory=list)
    """Steps whose hours are unknown."""

    @property
    def total(self) -> Usd:
        """Total of all lines."""
        return sum((line.usd for line in self.lines), Usd())

    def of(self, phase: str) -> Usd:
        """Return the cost of a phase."""
        return sum((line.usd for line in self.lines_of(phase)), Usd())

    def lines_of(self, phase: str) -> list[Line]:
        """Return the lines of a phase."""
        return [line for line in self.lines if line.phase == phase]

    def table(self, *, steps: bool = True) -> Table:
        """A line per step that runs, or per phase."""
        lines = self.lines if steps else list(self._by_phase())
        rows = [
            [
                line.phase,
                line.what,
                line.because,
                f"{line.flops:.2e}" if line.flops else "",
                _hours(line.hours),
                planned_text([line]),
                line.basis,
            ]
            for line in lines
        ]
        head = ["phase", "step", "because", "FLOPs", "pod hours", "USD", "from"]
        return Table(title="Plan in dollars", head=head, rows=rows, note=self._note())

    def _by_phase(self) -> Iterator[Line]:
        for phase in dict.fromkeys(line.phase for line in self.lines):
            mine = self.lines_of(phase)
            flops = sum(line.flops or 0.0 for line in mine) or None
            hours = sum((line.hours for line in mine), Usd())
            complete = all(line.complete for line in mine)
            yield Line(phase=phase, what=f"{len(mine)} lines", flops=flops, hours=hours, usd=self.of(phase), complete=complete)

    def _note(self) -> str:
        lines = [f"Total {planned_text(self.lines)} of {limit_text(self.cap_usd, self.reserve_usd)}."]
        lines += [f"The cap binds; these would not start: {', '.join(self.dropped)}."] if self.dropped else []
        risk = [one for one in self.at_risk if one not in self.dropped]
        lines += [f"If everything cost the upper end, these would not start: {', '.join(risk)}."] if risk else []
        lines += [f"The hours of {', '.join(self.unknown)} are not known."] if self.unknown else []
        return "\n".join(lines)


def in_dollars(plan: Plan, phases: Sequence[Phase], rental: Rental) -> DollarPlan:
    """Return the cost of a plan on rented machines."""
    rates = {"cpu": rental.cpu_usd_per_hour, "gpu": rental.gpu_usd_per_hour}
    lines = [line for phase in phases for line in _on_a_pod(plan, phase.name, rental, rates[phase.pool])]
    if lines:
        hours = sum((line.hours for line in lines), Usd())
        for phase, what, basis in (
            ("pipeline", WAITING, "the hours above"),
            (SERVER, SERVES, "the hours above; none with a server elsewhere"),
        ):
            line = _line(phase, what, hours, rental.pipeline_usd_per_hour, basis=basis)
            lines.append(line.model_copy(update={"complete": all(one.complete for one in lines)}))
        months = rental.days / DAYS_PER_MONTH
        stored = storage_usd_per_month(rental.volume_gb) * months
        usd = Usd(low=stored, value=stored, high=stored)
        lines.append(Line(phase="storage", what=f"{rental.volume_gb} GB for {rental.days:.0f} days", usd=usd, basis="list price"))
    return _checked(lines, rental)


def recipes_in_dollars(plan: Plan, rental: Rental) -> DollarPlan:
    """Return the cost of single recipes (`tasks.plan.plan_recipes`), one after the other on one GPU pod, without the cost of the volume."""
    return _checked(_on_a_pod(plan, RECIPES, rental, rental.gpu_usd_per_hour), rental)


def _on_a_pod(plan: Plan, phase: str, rental: Rental, rate: float) -> list[Line]:
    """Return the lines of a phase's steps that run, after a line for the start of their pod."""
    running = [one for one in plan.steps if one.phase == phase and one.state == "runs"]
    if not running:
        return []
    starts = Usd(low=rental.assumed.start_h / 3, value=rental.assumed.start_h, high=rental.assumed.start_h * 3)
    lines = [_line(phase, STARTS, starts, rate, basis="stated")]
    for one in running:
        hours, basis = hours_of(one, rental, overlap=plan.overlap.get(phase, 1.0))
        lines.append(_line(phase, one.step, hours or Usd(), rate, because=one.because, flops=one.flops, basis=basis))
    return lines


def _checked(lines: list[Line], rental: Rental) -> DollarPlan:
    """Return the plan of these lines, with the steps that would not start because of the cap."""
    limit = rental.cap_usd - rental.reserve_usd
    unknown = [line.what for line in lines if line.basis == NOT_KNOWN]
    at_risk = _beyond(lines, limit, lambda usd: usd.high)
    dropped = _beyond(lines, limit, lambda usd: usd.value)
    return DollarPlan(
        lines=lines, cap_usd=rental.cap_usd, reserve_usd=rental.reserve_usd, dropped=dropped, at_risk=at_risk, unknown=unknown
    )


def hours_of(step: StepPlan, rental: Rental, *, overlap: float = 1.0) -> tuple[Usd | None, str]:
    """Return the hours of a step on its pod, or None, and where they come from. `overlap`: see `Plan.overlap`."""
    assumed = rental.assumed
    if step.seconds is not None:
        hours = step.seconds * overlap / 3600
        return Usd(low=hours * (1 - MEASURED_SPREAD), value=hours, high=hours * (1 + MEASURED_SPREAD)), "measured"
    if step.flops is not None:
        least, most = step.flops_range or (step.flops, step.flops)
        per_hour = assumed.peak_tflops * 1e12 * rental.gpu_count * 3600
        mfu = assumed.mfu
        hours = Usd(low=least / per_hour / mfu.high, value=most / per_hour / mfu.expected, high=most / per_hour / mfu.low)
        size = ", the largest size" if step.flops_range else ""
        return hours, f"MFU {mfu.expected:.0%} [{mfu.low:.0%}, {mfu.high:.0%}]{size}"
    found = _stated(step.step, assumed.hours)
    if found is None:
        return None, NOT_KNOWN
    return Usd(low=found * (1 - STATED_SPREAD), value=found, high=found * (1 + STATED_SPREAD)), "stated"


def storage_usd_per_month(size_gb: int) -> float:
    """Return the price of a network volume."""
    return STORAGE_PER_GB_MONTH * min(size_gb, SMALL_GB) + LARGE_STORAGE_PER_GB_MONTH * max(0, size_gb - SMALL_GB)


def _line(phase: str, what: str, hours: Usd, rate: float, *, because: str = "", flops: float | None = None, basis: str) -> Line:
    complete = basis != NOT_KNOWN
    return Line(phase=phase, what=what, because=because, flops=flops, hours=hours, usd=hours.times(rate), basis=basis, complete=complete)


def _stated(step: str, hours: Mapping[str, float]) -> float | None:
    """Return the stated hours of the longest prefix of the step's name, or None."""
    names = [name for name in hours if step.startswith(name)]
    return hours[max(names, key=len)] if names else None


def _beyond(lines: Sequence[Line], limit: float, of: Callable[[Usd], float]) -> list[str]:
    """Return the steps that would exceed the limit, in the order in which they run. Storage is paid first."""
    used = sum(of(line.usd) for line in lines if line.phase == "storage")
    beyond = []
    for line in lines:
        if line.phase == "storage":
            continue
        used += of(line.usd)
        beyond += [line.what] if used > limit else []
    return beyond


def _hours(hours: Usd) -> str:
    return duration(hours.value * 3600) if hours.value else ""
