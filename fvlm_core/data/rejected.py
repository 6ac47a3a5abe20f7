"""Why samples were left out: kinds of reasons, and how often each occurred per source."""

import csv
import re
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

from fvlm_core.data.jobs import BadClip, RejectedCount

TRANSIENT = re.compile(
    r"Timeout|ConnectionError|ChunkedEncodingError|IncompleteRead|HTTP (Error )?(408|425|429|5\d\d)|"
    r"^cannot be read|too slow:|video2dataset left nothing"
)
"""Temporary reasons: a retry may succeed."""
LISTED = 100
"""Maximum number of samples listed in a manifest."""


def is_transient(reason: str) -> bool:
    """Whether the reason is temporary, so that the video may be fetched later."""
    return TRANSIENT.search(reason) is not None


def kind_of(reason: str) -> str:
    """Return the reason without details that concern only one video."""
    return re.sub(r"^\d+ ", "", re.split(r"[:(;]| at \d", reason)[0].strip())


class RejectedSamples:
    """Writes every sample that was left out to a csv file, counts them, and keeps the first LISTED."""

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
        """Add a sample that was left out."""
        self._writer.writerow([clip.source, clip.url, clip.reason])
        self._counts[clip.source, kind_of(clip.reason)] += 1
        if len(self.first) < LISTED:
            self.first.append(clip)

    @property
    def counts(self) -> list[RejectedCount]:
        """The counts by source and kind of reason."""
        return [RejectedCount(source=source, reason=reason, samples=number) for (source, reason), number in sorted(self._counts.items())]
