"""The message board of a volume: an append-only list of posts from pods and from the user's machine, each under a heading.

    ## [2026-11-25 17:30] RUNPOD
    stage1: step 4,000 of 7,800, loss 2.31

Each writer has its own file (`infra.store.Journal`), because two hosts cannot append to the same one. Every post rebuilds
`comms/BOARD.md` from all of these files. If two writers post at the same time, one entry may be missing there until the next post; it is
never lost.
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
    """One post."""

    at: float
    """Seconds since the epoch."""
    side: Side
    text: str

    def markdown(self) -> str:
        """Return the entry as Markdown, under a heading with the time in UTC."""
        return f"## [{time.strftime('%Y-%m-%d %H:%M', time.gmtime(self.at))}] {self.side}\n{self.text.strip()}\n"


class Board:
    """The board on a volume."""

    def __init__(self, store: Store, side: Side, *, writer: str = "", clock: Callable[[], float] = time.time) -> None:
        self.store, self.clock = store, clock
        self.side: Side = side
        self.journal = Journal(store, FOLDER, writer=writer)

    def post(self, text: str) -> Entry:
        """Add an entry. Raises ValueError if `text` is blank."""
        if not text.strip():
            raise ValueError("an entry needs a text")
        entry = Entry(self.clock(), self.side, text.strip())
        self.journal.append(json.dumps(asdict(entry)))
        self.store.write(BOARD, self.markdown().encode())
        return entry

    def entries(self) -> list[Entry]:
        """Return the entries of all writers, sorted by time."""
        found = []
        for line in self.journal.lines():
            try:
                said = json.loads(line)
                found.append(Entry(float(said["at"]), said["side"], str(said["text"])))
            except (ValueError, TypeError, KeyError):  # incomplete: the writer was killed
                continue
        return sorted(found, key=lambda one: one.at)

    def markdown(self) -> str:
        """Return the whole board as Markdown."""
        return "\n".join(entry.markdown() for entry in self.entries())
