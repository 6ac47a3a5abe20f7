"""How long a run may need between a SIGTERM and its end: it finishes its step and saves a checkpoint. No torch here: launchers ask."""

from pathlib import Path

from fvlm_core.train.jobs import CHECKPOINTS_FOLDER, MODEL_FOLDER

BASE_S = 30.0
"""For the step or the evaluation that is under way, and to leave."""
WRITE_BYTES_PER_S = 100e6
"""A checkpoint is written, and read back for its digests. Slow network disks are like that; a local one does twice as much."""
UNKNOWN_S = 300.0
"""Where nothing is known of the size: as long as for twice 13.5 GB, checkpoints of a billion parameters."""
SAVES = 2
"""The checkpoint that may be under way when the signal comes, and the last one."""
CHECKPOINT_SHARE = 3.0
"""A checkpoint's size as a multiple of its weights': AdamW keeps two more numbers per parameter."""


def stop_grace_s(output: Path, init_from: Path | None = None) -> float:
    """Seconds from SIGTERM to SIGKILL for the run in `output`, by the size of its newest checkpoint, else of the model it starts from."""
    size = _bytes(max((output / CHECKPOINTS_FOLDER).glob("step-*"), default=None))
    if not size and init_from is not None:
        size = CHECKPOINT_SHARE * _bytes(init_from / MODEL_FOLDER)
    return BASE_S + SAVES * size / WRITE_BYTES_PER_S if size else UNKNOWN_S


def _bytes(folder: Path | None) -> float:
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file()) if folder else 0
