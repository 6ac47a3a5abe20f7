"""Copies of shards on a local disk: a network volume is slow for many small reads, and fast for one large read.

A shard is copied when one of its samples is first needed, or ahead of time (`stage`). The copy is checked against the manifest's sha256,
and shared by all ranks and loader processes of the machine. Above the size limit, the least recently used copies are deleted.
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
"""Seconds without a write after which an unfinished copy is considered left by a killed process."""


class Staging:
    """The local copies of one set of shards."""

    def __init__(self, shards: Path, manifest: ShardManifest, settings: StagingSettings) -> None:
        self.shards, self.root = shards, settings.folder
        self.folder = settings.folder / f"shards-{manifest.digest[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.max_bytes = int(settings.max_gb * 1e9)
        self.digests = {entry.path: entry.sha256 for entry in manifest.files}
        self.refused: set[str] = set()
        """Shards that are read in place; each reason was logged."""

    def open(self, path: Path) -> int | None:
        """Return a file descriptor of the local copy, made if needed; None: read the shard in place. Close it soon."""
        name = path.relative_to(self.shards).as_posix()
        for _ in range(2):  # another process may evict the copy before it is opened
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
        """Copy a shard unless a copy exists. If that fails, the reason is logged, and the shard is read in place."""
        local = self._local(name)
        if name in self.refused or local.is_file():
            return
        try:
            with FileLock(self.folder / f"{local.name}.lock"):
                if local.is_file():
                    return
                size = (self.shards / name).stat().st_size
                part = local.with_suffix(".part")
                part.unlink(missing_ok=True)  # left by a killed process, since the lock is ours
                if not self._make_place(part, size):
                    self._refuse(name, f"its {size / 1e9:.2f} GB do not fit")
                    return
                try:
                    digest = _copy(self.shards / name, part)
                    if digest != self.digests.get(name, digest):
                        digest = _copy(self.shards / name, part)  # a file system that returned wrong data once may be right the second time
                except OSError:
                    part.unlink(missing_ok=True)  # it would count towards the limit
                    raise
                if digest != self.digests.get(name, digest):
                    part.unlink()
                    self._refuse(name, "its sha256 differs from the manifest's")
                    return
                part.replace(local)
        except OSError as error:
            self._refuse(name, error.strerror or str(error))

    def _local(self, name: str) -> Path:
        return self.folder / name.replace("/", "--")

    def _refuse(self, name: str, reason: str) -> None:
        self.refused.add(name)
        logger.warning("%s is read in place, not from a copy in %s: %s", self.shards / name, self.folder, reason)

    def _make_place(self, part: Path, size: int) -> bool:
        """Evict copies, also of other sets of shards, until `size` bytes fit under the limit and on the disk, and reserve them in `part`.

        Returns False if there is not enough space even then.
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
                    path.unlink(missing_ok=True)  # processes that have it open can still read it
                    held -= stat.st_size
            if not fits():
                return False
            with part.open("wb") as stream:
                stream.truncate(size)
            return True


def _files(root: Path) -> list[tuple[Path, os.stat_result]]:
    """List all copies, also unfinished ones, without those that disappear meanwhile."""
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
