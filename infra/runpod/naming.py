"""Pods' names. A name says whose a pod is, when it has to end and for which flow run it works, so that whoever sees a list of pods, and
nothing else, knows which to end."""

import re
import secrets
from dataclasses import dataclass
from typing import Self
from uuid import UUID

PREFIX = "fvlm"
NO_RUN = UUID(int=0)
"""In the name of a pod that works for no flow run: of the one that keeps the Prefect server. Its deadline is what ends it."""
_FORM = re.compile(r"(?P<owner>fvlm-[a-z0-9]+)-(?P<deadline>[0-9a-f]{8})-(?P<run>[0-9a-f]{32})-(?P<chance>[0-9a-f]{4})")


@dataclass(frozen=True)
class PodName:
    """`fvlm-VOLUME-DEADLINE-FLOWRUN-CHANCE`."""

    owner: str
    """`fvlm-VOLUME`: all pods of one volume, and nobody else's, begin with it."""
    deadline: int
    """Seconds since the epoch."""
    run: UUID
    """The flow run."""
    chance: str

    @classmethod
    def new(cls, volume: str, deadline: float, run: UUID) -> Self:
        """A name that no other pod has."""
        return cls(owner(volume), int(deadline), run, secrets.token_hex(2))

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """None where it is none of our names."""
        found = _FORM.fullmatch(name)
        return cls(found["owner"], int(found["deadline"], 16), UUID(found["run"]), found["chance"]) if found else None

    def __str__(self) -> str:
        return f"{self.owner}-{self.deadline:08x}-{self.run.hex}-{self.chance}"


def owner(volume: str) -> str:
    """The beginning of the names of a volume's pods."""
    return f"{PREFIX}-{''.join(letter for letter in volume.lower() if letter.isalnum())}"
