"""The budget: an append-only ledger, and a spending cap that is checked before any pod is created.

Each line of the ledger is one event of one pod or volume. Before a pod is created, its cost up to its deadline is first written to the
ledger as a reservation; only then is the total computed. Two workers that do this at the same time therefore both see both reservations,
and the cap holds; the price is that both may be refused near it. One gap: through S3 (a worker without the volume mounted), a ledger file
that a pod has just created can be listed minutes late. When a pod ends, its actual cost replaces the reservation, and RunPod's bill later
replaces both.
"""

import math
import time
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infra.errors import InfraError
from infra.store import Journal, Store

LEDGER = "budget/ledger"
"""Folder of the volume, with one file per writer."""
SERVER = "server"
"""Phase name of the pod that runs the Prefect server."""
WARN_AT = (0.50, 0.80, 0.95)
"""Shares of the cap at which a warning is given."""
HOUR_S = 3600.0
BILL_LAG_S = 2 * HOUR_S
"""Time after the end of a pod until its bill is complete; RunPod bills by the hour."""
LATEST_END_S = HOUR_S
"""How long after its deadline a pod without an `ended` event is still assumed to cost money."""

What = Literal["reserved", "storage", "started", "released", "ended", "billed"]
ORDER: tuple[What, ...] = get_args(What)
"""Order of the events in the life of a pod or volume."""


class BudgetError(InfraError):
    """The pod does not fit into the budget. Nothing was started."""


class Event(BaseModel):
    """One line of the ledger."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)

    what: What
    name: str
    """Name of the pod, which is never reused, or id of the volume."""
    at: float
    """Seconds since the epoch."""
    pod: str = ""
    """RunPod's id of the pod, in `started` events."""
    usd_per_hour: Annotated[float, Field(ge=0)] = 0.0
    until: float = 0.0
    """Deadline of the pod in seconds since the epoch, in `reserved` events."""
    usd: float = 0.0
    """Amount of RunPod's bill, in `billed` events."""
    phase: str = ""
    """Phase that the pod is rented for."""


@dataclass(frozen=True)
class Entry:
    """State of one pod or volume according to the ledger."""

    name: str
    since: float
    usd_per_hour: float
    until: float = 0.0
    pod: str = ""
    phase: str = ""
    kind: Literal["pod", "storage"] = "pod"
    ended: float | None = None
    started: bool = False
    released: bool = False
    billed: float | None = None
    billed_at: float = 0.0
    priced_at: float | None = None
    """When an enlarged volume got its current price. Its cost up to then is `usd_before`."""
    usd_before: float = 0.0

    @property
    def running(self) -> bool:
        """Whether it still costs money, as far as the ledger knows."""
        return not self.released and self.ended is None

    @property
    def settled(self) -> bool:
        """Whether its bill is complete: a bill that was read when it ended lacks the last hours."""
        return self.billed is not None and self.ended is not None and self.billed_at >= self.ended + BILL_LAG_S

    def spent(self, now: float) -> float:
        """Return the USD spent up to `now`: the bill if it is complete, otherwise price times time, or the bill so far if that is higher.

        A pod without an `ended` event is assumed to stop costing money `LATEST_END_S` after its deadline, because it ends itself. If it
        did not, the bill is higher.
        """
        if self.released:
            return 0.0
        if self.billed is not None and self.settled:
            return self.billed
        end = self.ended if self.ended is not None else now if self.kind == "storage" else min(now, self.until + LATEST_END_S)
        began = self.since if self.priced_at is None else self.priced_at
        return max(self.usd_before + max(0.0, end - began) * self.usd_per_hour / HOUR_S, self.billed or 0.0)

    def committed(self, now: float, horizon: float) -> float:
        """Return the USD still to come if it runs to its deadline; for storage, up to `horizon`."""
        if not self.running:
            return 0.0
        return max(0.0, (horizon if self.kind == "storage" else self.until) - now) * self.usd_per_hour / HOUR_S


@dataclass(frozen=True)
class Position:
    """State of the budget at one moment, in USD."""

    cap_usd: float
    reserve_usd: float
    spent: float
    """Cost of pods that have ended, and of running pods so far."""
    running: float
    """Cost that running pods may still incur up to their deadlines."""
    storage: float
    """Cost of storage so far and up to the last deadline."""
    entries: tuple[Entry, ...] = field(default=(), repr=False)

    @property
    def committed(self) -> float:
        """Everything that is spent or committed."""
        return self.spent + self.running + self.storage

    @property
    def left(self) -> float:
        """Maximum cost of a new pod."""
        return self.cap_usd - self.reserve_usd - self.committed

    def sum(self, new: float = 0.0) -> str:
        """Return the total and its parts as text, including a new pod of `new` USD if there is one."""
        parts = {"spent": self.spent, "running pods to their deadlines": self.running, "storage": self.storage}
        parts |= {"this pod to its deadline": new} if new else {}
        terms = " + ".join(f"{name} {usd_text(usd)}" for name, usd in parts.items())
        return f"{terms} = {usd_text(self.committed + new)} of {limit_text(self.cap_usd, self.reserve_usd)}"


class Budget:
    """The ledger on a volume, with a spending cap."""

    def __init__(
        self, store: Store, *, cap_usd: float, reserve_usd: float, writer: str = "", clock: Callable[[], float] = time.time
    ) -> None:
        """Spending never exceeds `cap_usd`. `reserve_usd` of it is held back for storage after the last pod and for late bills."""
        self.cap_usd, self.reserve_usd, self.clock = cap_usd, reserve_usd, clock
        self.journal = Journal(store, LEDGER, writer=writer)

    def capped(self, cap_usd: float, reserve_usd: float) -> Self:
        """Return the same ledger, with the same writer, under another cap."""
        other = copy(self)
        other.cap_usd, other.reserve_usd = cap_usd, reserve_usd
        return other

    def reserve(self, name: str, *, usd_per_hour: float, until: float, phase: str = "") -> Position:
        """Reserve the cost of a pod up to its deadline. Raises BudgetError, which lists the costs, if it does not fit."""
        self._write("reserved", name, usd_per_hour=usd_per_hour, until=until, phase=phase)
        position = self.position()
        if position.left < -1e-9:
            self.release(name)
            new = next(entry for entry in position.entries if entry.name == name).committed(self.clock(), until)
            before = replace(position, running=position.running - new)
            raise BudgetError(
                f"the budget does not allow it: {before.sum(new)}",
                where="the ledger (fvlm infra budget)",
                fix="wait for running pods to end, give a shorter maximum run time, a cheaper machine, or another machine.rental.cap_usd",
            )
        return position

    def started(self, name: str, pod: str, *, usd_per_hour: float) -> None:
        """Record that the pod was created, at this price."""
        self._write("started", name, pod=pod, usd_per_hour=usd_per_hour)

    def release(self, name: str) -> None:
        """Record that the reserved pod was never created."""
        self._write("released", name)

    def ended(self, name: str, *, at: float | None = None) -> None:
        """Record that the pod has ended and costs nothing any more."""
        self._write("ended", name, at=at)

    def billed(self, name: str, usd: float) -> None:
        """Record the amount of RunPod's bill."""
        self._write("billed", name, usd=usd)

    def storage(self, volume: str, usd_per_hour: float, *, since: float | None = None) -> None:
        """Record the price of a network volume, unless the ledger already has this price or a higher one.

        A volume can only grow, so a lower price is an outdated one.
        """
        known = max((entry.usd_per_hour for entry in self.entries() if entry.name == volume and entry.running), default=None)
        if known is None or usd_per_hour > known * (1 + 1e-9):
            self._write("storage", volume, usd_per_hour=usd_per_hour, at=since)

    def entries(self) -> tuple[Entry, ...]:
        """Return the state of all pods in the order of their reservations, then of all volumes."""
        return entries(self.events())

    def events(self) -> list[Event]:
        """Return all events, sorted by time. Incomplete lines are skipped: their writer was killed before it acted on them."""
        found = []
        for line in self.journal.lines():
            try:
                found.append(Event.model_validate_json(line))
            except ValidationError:
                continue
        return sorted(found, key=lambda event: event.at)

    def position(self) -> Position:
        """Return the current state of the budget."""
        now, all_of_it = self.clock(), self.entries()
        pods, storage = ([one for one in all_of_it if one.kind == kind] for kind in ("pod", "storage"))
        horizon = max((one.until for one in pods if one.running), default=now)
        return Position(
            self.cap_usd,
            self.reserve_usd,
            spent=sum(one.spent(now) for one in pods),
            running=sum(one.committed(now, horizon) for one in pods),
            storage=sum(one.spent(now) + one.committed(now, horizon) for one in storage),
            entries=all_of_it,
        )

    def _write(self, what: What, name: str, *, at: float | None = None, **more: float | str) -> None:
        event = Event.model_validate({"what": what, "name": name, "at": self.clock() if at is None else at} | more)
        self.journal.append(event.model_dump_json(exclude_defaults=True))


def entries(events: Iterable[Event]) -> tuple[Entry, ...]:
    """Reduce events to the state of each pod and volume. Events apply by `ORDER`, not by time, because the writers' clocks may differ."""
    known: dict[str, Entry] = {}
    for event in sorted(events, key=lambda event: (ORDER.index(event.what), event.at)):
        entry = known.get(event.name)
        if event.what == "reserved":
            known[event.name] = Entry(event.name, event.at, event.usd_per_hour, until=event.until, phase=event.phase)
        elif event.what == "storage":
            first = Entry(event.name, event.at, event.usd_per_hour, kind="storage")
            grown = entry and replace(entry, usd_per_hour=event.usd_per_hour, priced_at=event.at, usd_before=entry.spent(event.at))
            known[event.name] = grown or first
        elif entry is None:
            continue  # another writer's file, with the reservation, is not listed yet: S3 can be minutes late
        elif event.what == "started":
            known[event.name] = replace(entry, pod=event.pod, usd_per_hour=event.usd_per_hour, started=True, released=False)
        elif event.what == "released":
            known[event.name] = entry if entry.started else replace(entry, released=True)
        elif event.what == "ended":
            known[event.name] = entry if entry.ended is not None else replace(entry, ended=event.at)
        elif event.what == "billed":
            known[event.name] = replace(entry, billed=event.usd, billed_at=event.at)
    return tuple(known.values())


def usd_text(usd: float) -> str:
    """Format an amount, e.g. `$12.30`; below ten cents with two significant digits, e.g. `$0.0043`."""
    return f"${usd:.2f}" if usd == 0 or abs(usd) >= 0.1 else f"${usd:.{1 - math.floor(math.log10(abs(usd)))}f}"


def limit_text(cap_usd: float, reserve_usd: float) -> str:
    """Return how much may be spent, as text: the cap less the reserve."""
    return f"{usd_text(cap_usd - reserve_usd)} (cap {usd_text(cap_usd)} less a reserve of {usd_text(reserve_usd)})"


def warnings_between(before: float, after: float, cap_usd: float) -> list[str]:
    """Return a warning for each share of the cap (`WARN_AT`) that was passed between two totals."""
    passed = [share for share in WARN_AT if before < share * cap_usd <= after]
    return [f"{share:.0%} of the budget is spent or reserved: {usd_text(after)} of {usd_text(cap_usd)}" for share in passed]
