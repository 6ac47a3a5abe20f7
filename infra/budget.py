"""The money: a ledger that only grows, and the sum that every pod has to fit into before it is created.

A line of the ledger is one event of one pod or volume. Before a pod is created, its cost to its deadline is written down as reserved, and
only then is the sum made: of two workers that do this at once, both see both. So the cap holds whatever happens, at the price that both
may be refused near it. What a pod really cost replaces the reservation when it ends, and RunPod's bill replaces both.
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
"""Folder of the volume; a file per writer in it."""
SERVER = "server"
"""In place of a phase, for the pod that keeps the Prefect server."""
WARN_AT = (0.50, 0.80, 0.95)
"""Shares of the cap at which everybody is warned."""
HOUR_S = 3600.0
BILL_LAG_S = 2 * HOUR_S
"""After the end of a pod its bill is complete; RunPod bills by the hour."""
LATEST_END_S = HOUR_S
"""Past its deadline, a pod whose end was not written down is counted for no longer."""

What = Literal["reserved", "storage", "started", "released", "ended", "billed"]
ORDER: tuple[What, ...] = get_args(What)
"""In the life of a pod or volume."""


class BudgetError(InfraError):
    """It would not fit; nothing was started."""


class Event(BaseModel):
    """A line of the ledger."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)

    what: What
    name: str
    """Of the pod, unique for all time; of the volume, its id."""
    at: float
    """Seconds since the epoch."""
    pod: str = ""
    """RunPod's id, from `started` on."""
    usd_per_hour: Annotated[float, Field(ge=0)] = 0.0
    until: float = 0.0
    """The deadline, of `reserved`."""
    usd: float = 0.0
    """Of `billed`: what it cost by RunPod's bill."""
    phase: str = ""
    """What it was for."""


@dataclass(frozen=True)
class Entry:
    """What the ledger knows of one pod or volume."""

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
    """When a volume that has grown came to its present price; before that it cost `usd_before`."""
    usd_before: float = 0.0

    @property
    def running(self) -> bool:
        """Whether it costs money, as far as is known."""
        return not self.released and self.ended is None

    @property
    def settled(self) -> bool:
        """Whether its bill is complete: one of the time of its end lacks the last hours."""
        return self.billed is not None and self.ended is not None and self.billed_at >= self.ended + BILL_LAG_S

    def spent(self, now: float) -> float:
        """USD up to now: by the bill where that is complete, else by price and time, or by the bill where it is more.

        A pod whose end nobody wrote down costs nothing long after its deadline: it ended itself, or the bill says more.
        """
        if self.released:
            return 0.0
        if self.billed is not None and self.settled:
            return self.billed
        end = self.ended if self.ended is not None else now if self.kind == "storage" else min(now, self.until + LATEST_END_S)
        began = self.since if self.priced_at is None else self.priced_at
        return max(self.usd_before + max(0.0, end - began) * self.usd_per_hour / HOUR_S, self.billed or 0.0)

    def committed(self, now: float, horizon: float) -> float:
        """USD that will follow if it runs to its deadline; of storage, up to `horizon`."""
        if not self.running:
            return 0.0
        return max(0.0, (horizon if self.kind == "storage" else self.until) - now) * self.usd_per_hour / HOUR_S


@dataclass(frozen=True)
class Position:
    """Where the money is."""

    cap_usd: float
    reserve_usd: float
    spent: float
    """On pods that have ended and on what running ones have used."""
    running: float
    """What running pods may still use, to their deadlines."""
    storage: float
    """Spent and to the last deadline."""
    entries: tuple[Entry, ...] = field(default=(), repr=False)

    @property
    def committed(self) -> float:
        """All that is spent or promised."""
        return self.spent + self.running + self.storage

    @property
    def left(self) -> float:
        """USD that a new pod may cost."""
        return self.cap_usd - self.reserve_usd - self.committed

    def sum(self, new: float = 0.0) -> str:
        """The sum as text, with a pod of `new` USD where there is one."""
        parts = {"spent": self.spent, "running pods to their deadlines": self.running, "storage": self.storage}
        parts |= {"this pod to its deadline": new} if new else {}
        terms = " + ".join(f"{name} {usd_text(usd)}" for name, usd in parts.items())
        return f"{terms} = {usd_text(self.committed + new)} of {limit_text(self.cap_usd, self.reserve_usd)}"


class Budget:
    """The ledger on a volume, with a cap."""

    def __init__(
        self, store: Store, *, cap_usd: float, reserve_usd: float, writer: str = "", clock: Callable[[], float] = time.time
    ) -> None:
        """`cap_usd` may never be spent. `reserve_usd` of it is for what the sum cannot know: storage after the last pod, late bills."""
        self.cap_usd, self.reserve_usd, self.clock = cap_usd, reserve_usd, clock
        self.journal = Journal(store, LEDGER, writer=writer)

    def capped(self, cap_usd: float, reserve_usd: float) -> Self:
        """The same ledger, written by the same writer, under another cap."""
        other = copy(self)
        other.cap_usd, other.reserve_usd = cap_usd, reserve_usd
        return other

    def reserve(self, name: str, *, usd_per_hour: float, until: float, phase: str = "") -> Position:
        """Write down that a pod will run to its deadline. Raises BudgetError, with the sum, where that does not fit."""
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
        """The pod is there, at this price."""
        self._write("started", name, pod=pod, usd_per_hour=usd_per_hour)

    def release(self, name: str) -> None:
        """There is no pod of that name and there never was one."""
        self._write("released", name)

    def ended(self, name: str, *, at: float | None = None) -> None:
        """The pod costs no more."""
        self._write("ended", name, at=at)

    def billed(self, name: str, usd: float) -> None:
        """What it cost by RunPod's bill."""
        self._write("billed", name, usd=usd)

    def storage(self, volume: str, usd_per_hour: float, *, since: float | None = None) -> None:
        """A network volume costs money from now on, or more than before; nothing where that is known.

        A volume can only grow: of two who saw it at different times, the one who saw the lower price saw it earlier.
        """
        known = max((entry.usd_per_hour for entry in self.entries() if entry.name == volume and entry.running), default=None)
        if known is None or usd_per_hour > known * (1 + 1e-9):
            self._write("storage", volume, usd_per_hour=usd_per_hour, at=since)

    def entries(self) -> tuple[Entry, ...]:
        """What the ledger knows, in the order in which things began."""
        return entries(self.events())

    def events(self) -> list[Event]:
        """All lines, by time. A line that cannot be read (a writer that was killed half-way) is left out: it was never acted on."""
        found = []
        for line in self.journal.lines():
            try:
                found.append(Event.model_validate_json(line))
            except ValidationError:
                continue
        return sorted(found, key=lambda event: event.at)

    def position(self) -> Position:
        """Where the money is now."""
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
    """What events say of each pod and volume, whatever the clocks of their writers say of their order."""
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
            continue  # its beginning was lost; the bill will say what it cost
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
    """E.g. `$12.30`; of less than a dollar two digits that say something: `$0.0043`."""
    return f"${usd:.2f}" if usd == 0 or abs(usd) >= 0.1 else f"${usd:.{1 - math.floor(math.log10(abs(usd)))}f}"


def limit_text(cap_usd: float, reserve_usd: float) -> str:
    """What may be spent, and why it is so much."""
    return f"{usd_text(cap_usd - reserve_usd)} (cap {usd_text(cap_usd)} less a reserve of {usd_text(reserve_usd)})"


def warnings_between(before: float, after: float, cap_usd: float) -> list[str]:
    """A line for each share of the cap (WARN_AT) that was passed between two sums."""
    passed = [share for share in WARN_AT if before < share * cap_usd <= after]
    return [f"{share:.0%} of the budget is spent or promised: {usd_text(after)} of {usd_text(cap_usd)}" for share in passed]
