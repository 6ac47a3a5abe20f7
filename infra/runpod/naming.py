"""Names of pods. A name contains the owner, the deadline and the flow run of a pod, so that a list of pods is enough to know which of them
have to end."""

import re
import secrets
from dataclasses import dataclass
from typing import Self
from uuid import UUID

PREFIX = "fvlm"
NO_RUN = UUID(int=0)
"""Stands for the flow run in the name of a pod without one, i.e. the pod of the Prefect server. Such a pod ends at its deadline."""
_FORM = re.compile(r"(?P<owner>fvlm-[a-z0-9]+)-(?P<deadline>[0-9a-f]{8})-(?P<run>[0-9a-f]{32})-(?P<chance>[0-9a-f]{4})")


@dataclass(frozen=True)
class PodName:
    """`fvlm-VOLUME-DEADLINE-FLOWRUN-CHANCE`."""

    owner: str
    """`fvlm-VOLUME`: prefix of the names of all pods of one volume, and of no others."""
    deadline: int
    """Seconds since the epoch."""
    run: UUID
    """The flow run."""
    chance: str

    @classmethod
    def new(cls, volume: str, deadline: float, run: UUID) -> Self:
        """Return a new, unique name."""
        return cls(owner(volume), int(deadline), run, secrets.token_hex(2))

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Parse a pod's name. Returns None if it does not have this form."""
        found = _FORM.fullmatch(name)
        return cls(found["owner"], int(found["deadline"], 16), UUID(found["run"]), found["chance"]) if found else None

    def __str__(self) -> str:
        return f"{self.owner}-{self.deadline:08x}-{self.run.hex}-{self.chance}"


def owner(volume: str) -> str:
    """Return the prefix of the names of a volume's pods."""
    return f"{PREFIX}-{''.join(letter for letter in volume.lower() if letter.isalnum())}"
