"""Manifests: the records of results that are passed between steps.

A step writes its files into its own folder and finally, atomically, `manifest.json`: its results, counts, the sha256 of every
file, the hash of the settings, and the software versions. If the manifest exists, all its files were written completely;
`Manifest.problems` checks that they are still intact.
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
    """Path relative to the manifest's folder."""
    bytes: int
    sha256: str
    identity: bool = True
    """False for logs and timings: checked for damage, but excluded from the manifest's digest."""


class Manifest(Settings):
    """The result of a step. Subclasses add fields for the step's own results."""

    figures: ClassVar[tuple[Figure, ...]] = ()
    """The step's figures in display order; a figure that was not drawn has no file."""

    name: str
    """Name of the step, e.g. `train-stage2`."""
    settings_hash: str
    """sha256 of the step's settings."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """Digests of the input manifests, by name."""
    counts: dict[str, int] = Field(default_factory=dict)
    files: list[FileEntry] = Field(default_factory=list)
    commit: str = Field(default_factory=provenance.commit)
    """Git commit of the checkout that produced the result."""
    code: dict[str, str] = Field(default_factory=provenance.job_code)
    """Digests, by path, of the repository's files that the job imports."""
    versions: dict[str, str] = Field(default_factory=provenance.versions)
    """Versions of Python and of the libraries that a result can depend on."""
    created_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    seconds: float = 0.0
    """Wall-clock time of the step."""

    @property
    def digest(self) -> str:
        """Digest of the content: equal names, files and counts give equal digests, independent of time and place."""
        return hash_json([self.name, self.counts, sorted((f.path, f.sha256) for f in self.files if f.identity)])

    @property
    def other_code(self) -> list[str]:
        """Differences between the current code and libraries and those that produced the result, one clause each."""
        return provenance.changes(self.code, self.versions)

    def problems(self, folder: Path) -> list[str]:
        """Missing and damaged files in `folder`, one line each; empty if everything is intact."""
        with ThreadPoolExecutor(max_workers=4) as pool:
            return [problem for problem in pool.map(lambda entry: _problem(folder, entry), self.files) if problem]

    def write(self, folder: Path) -> Self:
        """Write `manifest.json` atomically; call this after all other files are written."""
        write_atomically(folder / FILE_NAME, self.model_dump_json(indent=2).encode())
        return self

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `folder/manifest.json`. Raises UserError if it is missing, damaged or does not match this class."""
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
            raise UserError(f"{what}: {error}", where=str(path), fix="run the step again, which rewrites it") from error

    @classmethod
    def read_whole(cls, folder: Path) -> Self | None:
        """The manifest of `folder` if it is readable and all its files are intact, else None."""
        try:
            manifest = cls.read(folder)
        except UserError:
            return None
        return None if manifest.problems(folder) else manifest


class AnyManifest(Manifest):
    """A manifest of any class: the common fields are typed, the step's own are in `model_extra`."""

    model_config = ConfigDict(extra="allow")


def file_entries(folder: Path, patterns: Iterable[str], *, identity: bool = True) -> list[FileEntry]:
    """Entries for all files in `folder` that match any of the glob `patterns`, sorted by path."""
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
    """Write to a temporary file, fsync and rename: readers see the old file or the new one, never a partial one."""
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
