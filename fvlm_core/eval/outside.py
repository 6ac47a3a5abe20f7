"""Files from outside that benchmarks read: that they are there, and what would make them others."""

from pathlib import Path

from fvlm_core.errors import UserError
from fvlm_core.eval.jobs import EvalSettings
from fvlm_core.manifest import sha256_file
from fvlm_core.settings import hash_json

SMALL_BYTES = 64 * 2**20


def check_outside(settings: EvalSettings) -> None:
    """Raises UserError where a file is missing."""
    for (part, file), path in settings.outside().items():
        if not path.is_file():
            raise UserError(f"{part}: its file {file!r} is missing", where=str(path), fix=f"correct evaluation.{part}.files.{file}")


def quick_digest(path: Path) -> str:
    """Identity of a file: its content, or its size and time of change where that is much to read. `missing` where there is none."""
    if not path.is_file():
        return "missing"
    stat = path.stat()
    return sha256_file(path) if stat.st_size <= SMALL_BYTES else hash_json([stat.st_size, stat.st_mtime_ns])
