"""Where RunPod, the volume and the keys to both are, and what is reached with them."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pydantic import SecretStr

from infra.errors import InfraError, RefusedError
from infra.runpod.client import API_URL, RunPod
from infra.runpod.models import Volume
from infra.runpod.pod import IDENTITY, OUTCOME, PODS
from infra.s3 import S3Store, connect
from infra.store import FolderStore, Store

KEY_VARIABLE = "RUNPOD_API_KEY"
S3_ACCESS_VARIABLE, S3_SECRET_VARIABLE = "RUNPOD_S3_ACCESS_KEY", "RUNPOD_S3_SECRET_KEY"


def mounted(path: str, volume: str) -> str | None:
    """The path, where the volume of that name or id is mounted there."""
    try:
        known = json.loads((Path(path) / IDENTITY).read_text())
    except (OSError, ValueError):
        return None
    return path if volume in (known.get("id"), known.get("name")) else None


@dataclass(frozen=True)
class Place:
    """One account and one of its volumes. What is left out comes from the environment."""

    volume: str
    """Name or id."""
    runpod_url: str = API_URL
    s3_url: str | None = None
    folder: str | None = None
    """Where the volume is mounted here; without it, it is reached through S3."""
    key: SecretStr | None = field(default=None, repr=False)
    s3_access_key: str | None = field(default=None, repr=False)
    s3_secret_key: SecretStr | None = field(default=None, repr=False)

    @property
    def identity(self) -> str:
        """Equal for equal places; tells no key."""
        key = self.key.get_secret_value() if self.key else ""
        return hashlib.sha256(f"{self.runpod_url}|{self.volume}|{self.s3_url}|{self.folder}|{key}".encode()).hexdigest()


class Account:
    """What a place gives access to. Nothing is asked before it is needed."""

    def __init__(self, place: Place) -> None:
        self.place = place
        key = place.key.get_secret_value() if place.key else os.environ.get(KEY_VARIABLE, "")
        self.client = RunPod(key, place.runpod_url)

    def volume(self) -> Volume:
        """The volume. Raises RefusedError where the account has none of that name or id."""
        return self._volume

    @cached_property
    def _volume(self) -> Volume:
        volumes = self.client.volumes()
        found = [one for one in volumes if self.place.volume in (one.id, one.name)]
        if len(found) == 1:
            return found[0]
        known = ", ".join(f"{one.name} ({one.id}, {one.dataCenter})" for one in volumes) or "none"
        raise RefusedError(
            f"{'several volumes are' if found else 'there is no volume'} called {self.place.volume!r}; there are: {known}",
            where="volume",
            fix="give its id" if found else "make it with `fvlm infra setup`, or give the name of one that is there",
        )

    @cached_property
    def store(self) -> Store:
        """The volume's small files: of the folder where it is mounted, else through S3."""
        if self.place.folder:
            return FolderStore(Path(self.place.folder))
        volume = self.volume()
        access = self.place.s3_access_key or os.environ.get(S3_ACCESS_VARIABLE)
        secret = self.place.s3_secret_key.get_secret_value() if self.place.s3_secret_key else os.environ.get(S3_SECRET_VARIABLE)
        if not access or not secret:
            raise RefusedError(
                "no key for the volume's S3 side, where the budget is kept",
                where=f"{S3_ACCESS_VARIABLE}, {S3_SECRET_VARIABLE}",
                fix="make an S3 API key at https://console.runpod.io/user/settings; it is another one than RUNPOD_API_KEY",
            )
        return S3Store(connect(volume.dataCenter, access, secret, url=self.place.s3_url), volume.id)

    def outcome(self, pod: str) -> str:
        """How the pod's job says that it ended; empty where it says nothing, or where the volume cannot be reached."""
        try:
            content = self.store.read(f"{PODS}/{pod}/{OUTCOME}")
            return str(json.loads(content)["reason"]) if content else ""
        except (InfraError, OSError, ValueError, KeyError):
            return ""
