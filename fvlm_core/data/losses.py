"""Why samples were left out: the kinds of reasons, and how often each occurred in each source."""

import csv
import re
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

from fvlm_core.data.jobs import BadClip, Loss

PASSING = re.compile(
    r"Timeout|ConnectionError|ChunkedEncodingError|IncompleteRead|HTTP (Error )?(408|425|429|5\d\d)|"
    r"^cannot be read|too slow:|video2dataset left nothing"
)
"""Reasons that another try may not meet."""
LISTED = 100
"""Samples that a manifest names."""


def passes(reason: str) -> bool:
    """Whether the same video may well be fetched later."""
    return PASSING.search(reason) is not None


def kind_of(reason: str) -> str:
    """The reason without what is of one video only."""
    return re.sub(r"^\d+ ", "", re.split(r"[:(;]| at \d", reason)[0].strip())


class Losses:
    """Writes every sample that was left out into a csv, counts them, and keeps the first."""

    def __init__(self, path: Path) -> None:
        self.first: list[BadClip] = []
        self._counts = Counter[tuple[str, str]]()
        self._stream = path.open("w", newline="")
        self._writer = csv.writer(self._stream, lineterminator="\n")
        self._writer.writerow(["source", "origin", "reason"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()

    def add(self, clip: BadClip) -> None:
        """One more."""
        self._writer.writerow([clip.source, clip.url, clip.reason])
        self._counts[clip.source, kind_of(clip.reason)] += 1
        if len(self.first) < LISTED:
            self.first.append(clip)

    @property
    def counts(self) -> list[Loss]:
        """By source and kind of reason."""
        return [Loss(source=source, reason=reason, samples=number) for (source, reason), number in sorted(self._counts.items())]
