"""A RunPod account with one of its volumes: their addresses and keys, and the clients for them."""

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
    """Return `path` if the volume with this name or id is mounted there, otherwise None."""
    try:
        known = json.loads((Path(path) / IDENTITY).read_text())
    except (OSError, ValueError):
        return None
    return path if volume in (known.get("id"), known.get("name")) else None


@dataclass(frozen=True)
class Place:
    """One account and one of its volumes. Keys that are None come from the environment."""

    volume: str
    """Name or id."""
    runpod_url: str = API_URL
    s3_url: str | None = None
    folder: str | None = None
    """Where the volume is mounted on this machine; None: it is accessed through S3."""
    key: SecretStr | None = field(default=None, repr=False)
    s3_access_key: str | None = field(default=None, repr=False)
    s3_secret_key: SecretStr | None = field(default=None, repr=False)

    @property
    def identity(self) -> str:
        """A hash that is equal for equal places and does not reveal the key."""
        key = self.key.get_secret_value() if self.key else ""
        return hashlib.sha256(f"{self.runpod_url}|{self.volume}|{self.s3_url}|{self.folder}|{key}".encode()).hexdigest()


class Account:
    """The clients for a place. No request is sent before it is needed."""

    def __init__(self, place: Place) -> None:
        self.place = place
        key = place.key.get_secret_value() if place.key else os.environ.get(KEY_VARIABLE, "")
        self.client = RunPod(key, place.runpod_url)

    def volume(self) -> Volume:
        """Return the volume. Raises RefusedError unless the account has exactly one with this name or id."""
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
        """The volume's small files: in the folder if it is mounted here, otherwise through S3."""
        if self.place.folder:
            return FolderStore(Path(self.place.folder))
        volume = self.volume()
        access = self.place.s3_access_key or os.environ.get(S3_ACCESS_VARIABLE)
        secret = self.place.s3_secret_key.get_secret_value() if self.place.s3_secret_key else os.environ.get(S3_SECRET_VARIABLE)
        if not access or not secret:
            raise RefusedError(
                "no key for the volume's S3 API, where the budget is kept",
                where=f"{S3_ACCESS_VARIABLE}, {S3_SECRET_VARIABLE}",
                fix="make an S3 API key at https://console.runpod.io/user/settings; it is not the same as RUNPOD_API_KEY",
            )
        return S3Store(connect(volume.dataCenter, access, secret, url=self.place.s3_url), volume.id)

    def outcome(self, pod: str) -> str:
        """Return how the pod's job ended, as the pod recorded it; empty if it did not, or if the volume cannot be reached."""
        try:
            content = self.store.read(f"{PODS}/{pod}/{OUTCOME}")
            return str(json.loads(content)["reason"]) if content else ""
        except (InfraError, OSError, ValueError, KeyError):
            return ""
