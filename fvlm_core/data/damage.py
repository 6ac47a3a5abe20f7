"""The damaged samples that a job has met, and how many it goes on with.

Counted are distinct samples: a damaged clip is one, however many conversations about it were to be read and on however many
ranks. What a rank finds is counted there at once; several exchange what is `new` and count the others' too.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fvlm_core.data.jobs import INDEX_FILE
from fvlm_core.errors import UserError

logger = logging.getLogger(__name__)

MAX_SHARE = 0.01
"""Of a mixture's samples (at least one sample) may be damaged before the job is stopped."""


@dataclass(frozen=True)
class Corrupt:
    """How a damaged sample was met."""

    row: int
    reason: str


class Damage:
    """Counts damaged samples by their numbers (`ShardSet.sample_numbers`)."""

    def __init__(self, n_samples: int, folder: Path, known: Iterable[int] = ()) -> None:
        """`n_samples`: distinct ones of the mixture; `folder`: the shards; `known`: met before."""
        self.limit, self.folder = max(1, int(MAX_SHARE * n_samples)), folder
        self.samples = set(known)
        self.new: set[int] = set()
        """Met since the last `merge`."""

    def add(self, found: dict[int, Corrupt]) -> None:
        """Count samples that were met here, and log those that are new."""
        for sample, corrupt in found.items():
            if sample not in self.samples:
                self.samples.add(sample)
                self.new.add(sample)
                place = f"row {corrupt.row} of {self.folder / INDEX_FILE}: {corrupt.reason}"
                logger.warning("skipped damaged sample %d of at most %d: %s", len(self.samples), self.limit, place)

    def merge(self, samples: Iterable[int]) -> None:
        """Count samples that any rank has met, this one too."""
        self.samples.update(samples)
        self.new.clear()

    def check(self) -> None:
        """Raises UserError when there are more than the limit."""
        if len(self.samples) > self.limit:
            raise UserError(f"more than {self.limit} damaged samples", where=str(self.folder), fix="make the shards again")
