"""External files and folders that benchmarks read: existence checks and digests."""

from pathlib import Path

from fvlm_core.errors import UserError
from fvlm_core.eval.annotations import SUFFIXES
from fvlm_core.eval.benchmarks.benchmark import HUB_NAME
from fvlm_core.eval.jobs import EvalSettings
from fvlm_core.manifest import sha256_file
from fvlm_core.settings import hash_json

SMALL_BYTES = 64 * 2**20


def check_external_files(settings: EvalSettings) -> None:
    """Raise UserError if a file or folder is missing. Dataset names on the hub are not checked until the dataset is read."""
    for (part, setting), path in settings.outside().items():
        if not path.exists() and not HUB_NAME.match(str(path)):
            raise UserError(f"{part}: its {setting} is missing", where=str(path), fix=f"correct evaluation.{part}.{setting}")


def quick_digest(path: Path) -> str:
    """Like `digest`, but files above `SMALL_BYTES` are identified by size and modification time instead of their content."""
    return _digest(path, _quick)


def digest(path: Path) -> str:
    """Digest of a file's content, or of a folder's annotation files (not its media); the path itself if nothing exists there."""
    return _digest(path, sha256_file)


def _digest(path: Path, of_file) -> str:
    if path.is_file():
        return of_file(path)
    if not path.is_dir():
        return str(path)
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    return hash_json([[file.relative_to(path).as_posix(), of_file(file)] for file in files])


def _quick(path: Path) -> str:
    stat = path.stat()
    return sha256_file(path) if stat.st_size <= SMALL_BYTES else hash_json([stat.st_size, stat.st_mtime_ns])
