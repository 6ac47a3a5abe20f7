"""Manifests: the one thing that flows between steps.

A step writes its files into its own folder and then, last and atomically, `manifest.json`: what was made, counts, sha256
of every file, the settings' hash, the software versions. A manifest that exists means its files are intact; `problems`
checks that they still are.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Self

from pydantic import ConfigDict, Field, ValidationError

from fvlm_core import provenance
from fvlm_core.errors import UserError
from fvlm_core.figures import Figure
from fvlm_core.settings import Settings, hash_json

FILE_NAME = "manifest.json"


class FileEntry(Settings):
    """One file of a step."""

    path: str
    """Relative to the manifest's folder."""
    bytes: int
    sha256: str
    identity: bool = True
    """False for logs and timings: checked for damage, but not part of what the step made."""


class Manifest(Settings):
    """What a step made. Subclasses add the step's own results."""

    figures: ClassVar[tuple[Figure, ...]] = ()
    """The step's pictures, in the order to show them; one that was not drawn has no file."""

    name: str
    """The step, e.g. `train-stage2`."""
    settings_hash: str
    """sha256 of the settings that made it."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """Digest of each input manifest, by name."""
    counts: dict[str, int] = Field(default_factory=dict)
    files: list[FileEntry] = Field(default_factory=list)
    commit: str = Field(default_factory=provenance.commit)
    """The checkout's commit when it was made."""
    code: dict[str, str] = Field(default_factory=provenance.running)
    """The repository's files that its job reaches, and their digests."""
    versions: dict[str, str] = Field(default_factory=provenance.versions)
    """Of Python and of the libraries that a result can depend on."""
    created_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    seconds: float = 0.0
    """Wall-clock time the step took."""

    @property
    def digest(self) -> str:
        """Identity of the content: equal files and counts give equal digests, whenever and wherever they were made."""
        return hash_json([self.name, self.counts, sorted((f.path, f.sha256) for f in self.files if f.identity)])

    @property
    def other_code(self) -> list[str]:
        """How the code and libraries of now differ from those that made it, a clause each."""
        return provenance.changes(self.code, self.versions)

    def problems(self, folder: Path) -> list[str]:
        """What is missing or damaged in `folder`, a line each; empty when everything is intact."""
        with ThreadPoolExecutor(max_workers=4) as pool:
            return [problem for problem in pool.map(lambda entry: _problem(folder, entry), self.files) if problem]

    def write(self, folder: Path) -> Self:
        """Write `manifest.json` atomically; call it after every other file is written."""
        write_atomically(folder / FILE_NAME, self.model_dump_json(indent=2).encode())
        return self

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `folder/manifest.json`. Raises UserError if there is none or it does not fit this class."""
        path = folder / FILE_NAME
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise UserError(
                "no manifest: the step that makes it has not finished",
                where=str(path),
                fix="run the step that makes it first (shards: `fvlm data prepare`)",
            ) from error
        except ValidationError as error:
            damaged = any(fault["type"] == "json_invalid" for fault in error.errors())
            what = "the manifest is damaged" if damaged else "the manifest was written by another version of this code"
            raise UserError(f"{what}: {error}", where=str(path), fix="run the step again, which makes it anew") from error

    @classmethod
    def read_whole(cls, folder: Path) -> Self | None:
        """The manifest of `folder` if it exists and all its files are intact, else None."""
        try:
            manifest = cls.read(folder)
        except UserError:
            return None
        return None if manifest.problems(folder) else manifest


class AnyManifest(Manifest):
    """A manifest of whatever kind: the common fields typed, the step's own in `model_extra`."""

    model_config = ConfigDict(extra="allow")


def file_entries(folder: Path, patterns: Iterable[str], *, identity: bool = True) -> list[FileEntry]:
    """Entries for every file in `folder` that matches one of the glob `patterns`, sorted by path."""
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return [
        FileEntry(path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=sha256_file(path), identity=identity)
        for path in paths
    ]


def sha256_file(path: Path) -> str:
    """sha256 hex of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write through a temporary name, fsync and rename: readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _problem(folder: Path, entry: FileEntry) -> str | None:
    path = folder / entry.path
    if not path.is_file():
        return f"{entry.path}: missing"
    if path.stat().st_size != entry.bytes:
        return f"{entry.path}: {path.stat().st_size} bytes, expected {entry.bytes}"
    return None if sha256_file(path) == entry.sha256 else f"{entry.path}: damaged (sha256 differs)"
