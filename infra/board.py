"""The message board of a volume: entries that are only ever added, from pods and from home, under headings with time and place.

    ## [2026-11-25 17:30] RUNPOD
    stage1: step 4,000 of 7,800, loss 2.31

Each writer has a file of its own (`infra.store.Journal`), because two hosts cannot append to one. `comms/BOARD.md` is made of all of them
whenever somebody posts; an entry that two posters at once leave out of it is in it again with the next one, and is never lost.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from infra.store import Journal, Store

FOLDER, BOARD = "comms/entries", "comms/BOARD.md"
Side = Literal["LOCAL", "RUNPOD"]


@dataclass(frozen=True)
class Entry:
    """What somebody wrote."""

    at: float
    """Seconds since the epoch."""
    side: Side
    text: str

    def markdown(self) -> str:
        """The entry under its heading, in UTC."""
        return f"## [{time.strftime('%Y-%m-%d %H:%M', time.gmtime(self.at))}] {self.side}\n{self.text.strip()}\n"


class Board:
    """The board on a volume."""

    def __init__(self, store: Store, side: Side, *, writer: str = "", clock: Callable[[], float] = time.time) -> None:
        self.store, self.clock = store, clock
        self.side: Side = side
        self.journal = Journal(store, FOLDER, writer=writer)

    def post(self, text: str) -> Entry:
        """Add an entry. Raises ValueError for one that says nothing."""
        if not text.strip():
            raise ValueError("an entry needs a text")
        entry = Entry(self.clock(), self.side, text.strip())
        self.journal.append(json.dumps(asdict(entry)))
        self.store.write(BOARD, self.markdown().encode())
        return entry

    def entries(self) -> list[Entry]:
        """Everybody's entries, by time."""
        found = []
        for line in self.journal.lines():
            try:
                said = json.loads(line)
                found.append(Entry(float(said["at"]), said["side"], str(said["text"])))
            except (ValueError, TypeError, KeyError):  # of a writer that was killed half-way
                continue
        return sorted(found, key=lambda one: one.at)

    def markdown(self) -> str:
        """All of it."""
        return "\n".join(entry.markdown() for entry in self.entries())
