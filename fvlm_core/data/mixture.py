"""Which samples make up which step: a pure function of the seed and the step, so a run resumes from a single integer.

Sources are interleaved in blocks of 1000 samples that contain exactly each source's share (largest remainder), spread evenly
over the block. Each source goes through its rows in a new seeded shuffle every epoch. The global batch is planned first, and
then dealt to ranks and micro-batches (`fvlm_core.data.balancing`), so a step's samples depend on neither.
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


def sample_shares(token_shares: Sequence[float], mean_tokens: Sequence[float]) -> list[float]:
    """Convert shares of tokens into shares of samples, given the mean tokens per sample of each source."""
    samples = np.asarray(token_shares) / np.maximum(mean_tokens, 1e-9)
    return (samples / samples.sum()).tolist()


def interleave(counts: Sequence[int]) -> np.ndarray:
    """Return int [sum(counts)], in which each index `i` appears `counts[i]` times, spaced as evenly as possible."""
    owner = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count])
    return owner[np.argsort(place, kind="stable")]


class Mixture:
    """An endless sequence of samples from several sources."""

    def __init__(
        self, names: Sequence[str], shares: Sequence[float], shard_rows: Sequence[Sequence[int]], seed: int, *, window: int | None = None
    ) -> None:
        """`shard_rows`: number of rows in each shard of each source; `window`: how many shards are shuffled together (None: all).

        Raises ValueError if a source with a share has no rows, or if its share is too small for one sample per block.
        """
        self.names, self.seed, self.window = list(names), seed, window
        self.shard_rows = [tuple(map(int, rows)) for rows in shard_rows]
        self.sizes = [sum(rows) for rows in self.shard_rows]
        self.counts = apportion(shares, BLOCK_SAMPLES)
        for name, share, size, count in zip(names, shares, self.sizes, self.counts, strict=True):
            if share > 0 and not count:
                raise ValueError(f"the share of {name!r} is below 1/{BLOCK_SAMPLES}")
            if share > 0 and not size:
                raise ValueError(f"{name!r} has no samples")
        self.block = interleave(self.counts)
        self.rank_in_block = np.zeros(BLOCK_SAMPLES, int)
        for index in range(len(names)):
            mine = self.block == index
            self.rank_in_block[mine] = np.arange(mine.sum())

    def at(self, number: int) -> tuple[int, int]:
        """Return the source of the run's sample `number`, and the sample's position in that source's endless sequence."""
        block, place = divmod(number, BLOCK_SAMPLES)
        source = int(self.block[place])
        return source, block * self.counts[source] + int(self.rank_in_block[place])

    def row(self, source: int, position: int) -> int:
        """Return the row (0 to size - 1) at a position of a source's sequence. Every epoch is a new shuffle of all rows."""
        epoch, place = divmod(position, self.sizes[source])
        return int(_shuffle(self.seed, self.names[source], epoch, self.shard_rows[source], self.window)[place])


def hashed_bernoulli(share: float, *identity: object) -> bool:
    """Return True with probability `share`, decided by a hash of `identity`."""
    digest = blake2b(repr(identity).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


@lru_cache(maxsize=64)
def _shuffle(seed: int, name: str, epoch: int, shard_rows: tuple[int, ...], window: int | None) -> np.ndarray:
    """Return an epoch's order of all rows, int32. With `window`, rows are only shuffled among that many (shuffled) shards at a time."""
    rng = np.random.default_rng([seed, crc32(name.encode()), epoch])
    if window is None:
        return rng.permutation(sum(shard_rows)).astype(np.int32)
    ends = np.cumsum(shard_rows)
    shards = [np.arange(end - rows, end, dtype=np.int32) for rows, end in zip(shard_rows, ends, strict=True)]
    order = rng.permutation(len(shards))
    groups = (order[start : start + window] for start in range(0, len(order), window))
    return np.concatenate([rng.permutation(np.concatenate([shards[shard] for shard in group])) for group in groups])
