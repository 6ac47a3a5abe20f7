"""Uploads the code that pods run: an archive of the checkout, named by its commit and uploaded once."""

import gzip
import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

from infra.errors import RefusedError
from infra.runpod.pod import CODE
from infra.store import Store

CLEAN_LENGTH, CHANGES_LENGTH = 16, 8
COMMIT_FILE = ".commit"
"""File in the archive, which has no .git, with the commit of the code; manifests record it."""
LARGEST_BYTES = 50_000_000
"""Maximum size of the archive; a larger one cannot be only code."""


def upload_code(checkout: Path, store: Store) -> str:
    """Upload the checkout to the volume, unless it is already there, and return its name.

    Files that git ignores are not uploaded. A checkout with uncommitted changes gets its own name, made from the archive's content.
    """
    name, archive = archived(checkout)
    key = f"{CODE}/{name}.tar.gz"
    if key not in store.keys(f"{CODE}/"):
        store.write(key, archive)
    return name


def archived(checkout: Path) -> tuple[str, bytes]:
    """Return name and content of the checkout's archive, which are equal for equal files. Raises RefusedError if it is too large."""
    commit = _git(checkout, "rev-parse", "HEAD").strip()
    changed = bool(_git(checkout, "status", "--porcelain"))
    files = sorted(set(_git(checkout, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")) - {""})
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as archive:
        said = f"{commit}{'+changes' if changed else ''}\n".encode()
        entry = tarfile.TarInfo(COMMIT_FILE)
        entry.size = len(said)
        archive.addfile(entry, io.BytesIO(said))
        for file in files:
            path = checkout / file
            if path.is_file() and not path.is_symlink():
                entry = tarfile.TarInfo(file)
                entry.size, entry.mode = path.stat().st_size, 0o755 if path.stat().st_mode & 0o100 else 0o644
                with path.open("rb") as stream:
                    archive.addfile(entry, stream)
    content = packed.getvalue()
    if len(content) > LARGEST_BYTES:
        raise RefusedError(
            f"the checkout packs to {len(content) / 1e6:.0f} MB", where=str(checkout), fix="keep data out of it, or list it in .gitignore"
        )
    name = commit[:CLEAN_LENGTH]
    return (f"{name}-{hashlib.sha256(content).hexdigest()[:CHANGES_LENGTH]}" if changed else name), content


def _git(checkout: Path, *arguments: str) -> str:
    try:
        return subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RefusedError(f"git {arguments[0]} failed: {error}", where=str(checkout), fix="run this in a checkout of fvlm") from error
