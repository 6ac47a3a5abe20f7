"""The processes of an evaluation under torchrun. They share nothing but a folder: each writes its shards, the first adds them up."""

from collections.abc import Mapping
from typing import NamedTuple


class Ranks(NamedTuple):
    """One process among `size`."""

    rank: int = 0
    size: int = 1
    local: int = 0
    """Among those of its machine: the GPU to use."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Ranks":
        """As torchrun describes it; alone where it describes nothing."""
        return cls(*(int(environment.get(key, alone)) for key, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))


ALONE = Ranks()
