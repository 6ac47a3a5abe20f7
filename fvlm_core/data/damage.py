"""Counts the damaged samples that a job has found, and stops it if there are too many.

Distinct samples are counted: a damaged clip counts once, regardless of how many conversations about it are read, and on how many ranks.
Each rank counts the samples that it finds immediately; ranks then exchange their `new` samples and count those of the others.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fvlm_core.data.jobs import INDEX_FILE
from fvlm_core.errors import UserError

logger = logging.getLogger(__name__)

MAX_SHARE = 0.01
"""Share of a mixture's samples that may be damaged before the job is stopped; one sample is always allowed."""


@dataclass(frozen=True)
class Corrupt:
    """Where a damaged sample was found, and what is wrong with it."""

    row: int
    reason: str


class Damage:
    """Counts damaged samples by their numbers (`ShardSet.sample_numbers`)."""

    def __init__(self, n_samples: int, folder: Path, known: Iterable[int] = ()) -> None:
        """`n_samples`: distinct samples of the mixture; `folder`: the shards; `known`: damaged samples found before."""
        self.limit, self.folder = max(1, int(MAX_SHARE * n_samples)), folder
        self.samples = set(known)
        self.new: set[int] = set()
        """Found since the last `merge`."""

    def add(self, found: dict[int, Corrupt]) -> None:
        """Count samples found on this rank, and log the new ones."""
        for sample, corrupt in found.items():
            if sample not in self.samples:
                self.samples.add(sample)
                self.new.add(sample)
                place = f"row {corrupt.row} of {self.folder / INDEX_FILE}: {corrupt.reason}"
                logger.warning("skipped damaged sample %d of at most %d: %s", len(self.samples), self.limit, place)

    def merge(self, samples: Iterable[int]) -> None:
        """Count samples found on any rank, including this one."""
        self.samples.update(samples)
        self.new.clear()

    def check(self) -> None:
        """Raise UserError if there are more than the limit."""
        if len(self.samples) > self.limit:
            raise UserError(f"more than {self.limit} damaged samples", where=str(self.folder), fix="make the shards again")
