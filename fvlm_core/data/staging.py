"""Copies of shards on a local disk: a network volume answers many small reads slowly, and one large one fast.

A shard is copied when a sample of it is first wanted, or before (`ahead`), checked against the manifest's sha256, and shared by all ranks
and loader processes of the machine. Above the cap, the least recently used copies go.
"""

import hashlib
import logging
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from fvlm_core.config import StagingSettings
from fvlm_core.data.jobs import ShardManifest

logger = logging.getLogger(__name__)

CHUNK_BYTES = 8 * 1024 * 1024
ABANDONED_S = 600
"""An unfinished copy that nobody has written to for so long was left by a process that was killed."""


class Staging:
    """The local copies of one set of shards."""

    def __init__(self, shards: Path, manifest: ShardManifest, settings: StagingSettings) -> None:
        self.shards, self.root = shards, settings.folder
        self.folder = settings.folder / f"shards-{manifest.digest[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.max_bytes = int(settings.max_gb * 1e9)
        self.digests = {entry.path: entry.sha256 for entry in manifest.files}
        self.refused: set[str] = set()
        """Shards that are read where they are, each for a reason that was logged."""

    def open(self, path: Path) -> int | None:
        """A descriptor of the local copy, made where there is none; None: read the shard where it is. Close it soon."""
        name = path.relative_to(self.shards).as_posix()
        for _ in range(2):  # between making and opening, another process may evict it
            if name in self.refused:
                return None
            local = self._local(name)
            try:
                descriptor = os.open(local, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.stage(name)
                continue
            os.utime(descriptor)
            return descriptor
        return None

    def stage(self, name: str) -> None:
        """Copy a shard, unless its copy is there. Whatever prevents it is logged, and the shard is read where it is."""
        local = self._local(name)
        if name in self.refused or local.is_file():
            return
        try:
            with FileLock(self.folder / f"{local.name}.lock"):
                if local.is_file():
                    return
                size = (self.shards / name).stat().st_size
                part = local.with_suffix(".part")
                part.unlink(missing_ok=True)  # of a killed process: the lock is ours
                if not self._make_place(part, size):
                    self._refuse(name, f"its {size / 1e9:.2f} GB do not fit")
                    return
                try:
                    digest = _copy(self.shards / name, part)
                    if digest != self.digests.get(name, digest):
                        digest = _copy(self.shards / name, part)  # a file system that lies once may be right the second time
                except OSError:
                    part.unlink(missing_ok=True)  # it would count against the cap
                    raise
                if digest != self.digests.get(name, digest):
                    part.unlink()
                    self._refuse(name, "what was read is not what the manifest says")
                    return
                part.replace(local)
        except OSError as error:
            self._refuse(name, error.strerror or str(error))

    def _local(self, name: str) -> Path:
        return self.folder / name.replace("/", "--")

    def _refuse(self, name: str, reason: str) -> None:
        self.refused.add(name)
        logger.warning("%s is read where it is, not from a copy in %s: %s", self.shards / name, self.folder, reason)

    def _make_place(self, part: Path, size: int) -> bool:
        """Evict copies, of other sets of shards too, until `part` of `size` bytes fits under the cap and on the disk, and take that place.

        False where that is not enough.
        """
        with FileLock(self.root / "eviction.lock"):
            files = sorted(_files(self.root), key=lambda file: file[1].st_mtime)
            held = sum(stat.st_size for _, stat in files)

            def fits() -> bool:
                return held + size <= self.max_bytes and shutil.disk_usage(self.root).free >= size

            for path, stat in files:
                if fits():
                    break
                if path.suffix == ".tar" or time.time() - stat.st_mtime > ABANDONED_S:
                    path.unlink(missing_ok=True)  # whoever has it open reads on
                    held -= stat.st_size
            if not fits():
                return False
            with part.open("wb") as stream:
                stream.truncate(size)
            return True


def _files(root: Path) -> list[tuple[Path, os.stat_result]]:
    """All copies, those that are being made too; one that goes meanwhile is none."""
    found = []
    for path in root.glob("shards-*/*"):
        if path.suffix in (".tar", ".part"):
            with suppress(FileNotFoundError):
                found.append((path, path.stat()))
    return found


def _copy(source: Path, target: Path) -> str:
    """Copy a file; returns its sha256."""
    digest = hashlib.sha256()
    with source.open("rb") as stream, target.open("r+b") as out:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            out.write(chunk)
    return digest.hexdigest()
