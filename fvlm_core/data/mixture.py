"""Which samples make up which step: a pure function of the seed and the step, so a run resumes from one integer.

Sources are interleaved in blocks of 1000 samples that hold exactly each source's share (largest remainder), spread evenly
over the block. Each source walks through its rows in a new seeded shuffle every epoch. The global batch is planned first
and dealt to ranks and micro-batches after, so a step's samples depend on neither.
"""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from zlib import crc32

import numpy as np

BLOCK_SAMPLES = 1000
"""Samples within which every source has exactly its share."""


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Split `total` by `shares` (which add up to 1) into whole numbers, by largest remainder."""
    exact = np.asarray(shares) * total
    counts = np.floor(exact + 1e-9).astype(int)
    for index in np.argsort(-(exact - counts), kind="stable")[: total - counts.sum()]:
        counts[index] += 1
    return counts.tolist()


def spread(counts: Sequence[int]) -> np.ndarray:
    """int [sum(counts)]: each index `i` appears `counts[i]` times, as evenly as can be."""
    owner = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count])
    return owner[np.argsort(place, kind="stable")]


class Mixture:
    """An endless sequence of samples out of several sources."""

    def __init__(self, names: Sequence[str], shares: Sequence[float], sizes: Sequence[int], seed: int) -> None:
        """`sizes`: rows of each source. Raises ValueError if a source with a share has no place in a block, or no rows."""
        self.names, self.sizes, self.seed = list(names), list(sizes), seed
        self.counts = apportion(shares, BLOCK_SAMPLES)
        for name, share, size, count in zip(names, shares, sizes, self.counts, strict=True):
            if share > 0 and not count:
                raise ValueError(f"the share of {name!r} is below 1/{BLOCK_SAMPLES}")
            if share > 0 and not size:
                raise ValueError(f"{name!r} has no samples")
        self.block = spread(self.counts)
        self.rank_in_block = np.zeros(BLOCK_SAMPLES, int)
        for index in range(len(names)):
            mine = self.block == index
            self.rank_in_block[mine] = np.arange(mine.sum())

    def at(self, number: int) -> tuple[int, int]:
        """The source of the run's sample `number`, and that sample's position in the source's own endless sequence."""
        block, place = divmod(number, BLOCK_SAMPLES)
        source = int(self.block[place])
        return source, block * self.counts[source] + int(self.rank_in_block[place])

    def row(self, source: int, position: int) -> int:
        """The row (0 to size - 1) at a position of a source's sequence: every epoch is a new shuffle of all rows."""
        epoch, place = divmod(position, self.sizes[source])
        return int(_shuffle(self.seed, self.names[source], epoch, self.sizes[source])[place])


def coin(share: float, *identity: object) -> bool:
    """True with probability `share`, decided by a hash of `identity`."""
    digest = blake2b(repr(identity).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def deal(costs: Sequence[tuple], bins: int) -> list[list[int]]:
    """Deal items to `bins` of nearly equal count and cost: costliest first, there and back again.

    Returns the items' indexes per bin, ascending. Every bin gets len(costs) // bins items or one more.
    """
    order = sorted(range(len(costs)), key=lambda index: (costs[index], -index), reverse=True)
    dealt: list[list[int]] = [[] for _ in range(bins)]
    for place, item in enumerate(order):
        turn, slot = divmod(place, bins)
        dealt[slot if turn % 2 == 0 else bins - 1 - slot].append(item)
    return [sorted(items) for items in dealt]


@lru_cache(maxsize=64)
def _shuffle(seed: int, name: str, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, crc32(name.encode()), epoch]).permutation(size)
