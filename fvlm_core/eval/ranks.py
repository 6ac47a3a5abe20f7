"""The ranks of an evaluation under torchrun. They share only a folder: each writes its shards, and rank 0 aggregates them."""

from collections.abc import Mapping
from typing import NamedTuple


class Ranks(NamedTuple):
    """Rank of this process, and the number of ranks."""

    rank: int = 0
    size: int = 1
    local: int = 0
    """Local rank on this machine, which is the index of the GPU to use."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Ranks":
        """Read torchrun's environment variables; a single rank if they are not set."""
        return cls(*(int(environment.get(key, alone)) for key, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))


ALONE = Ranks()
