"""Grace period of a run between SIGTERM and SIGKILL, to finish its step and save a checkpoint. Does not import torch, for launchers."""

from pathlib import Path

from fvlm_core.train.jobs import CHECKPOINTS_FOLDER, MODEL_FOLDER

BASE_S = 30.0
"""Time to finish the current step or evaluation, and to exit."""
WRITE_BYTES_PER_S = 100e6
"""Speed of writing a checkpoint and reading it back for its digests, on a slow network disk; a local disk is twice as fast."""
UNKNOWN_S = 300.0
"""Grace period if the checkpoint size is unknown: enough for two checkpoints of 13.5 GB (a billion parameters)."""
SAVES = 2
"""Number of checkpoints to wait for: one that may be in progress at the signal, and the final one."""
CHECKPOINT_SHARE = 3.0
"""Ratio of a checkpoint's size to that of the weights: AdamW has two moments per parameter."""


def stop_grace_s(output: Path, init_from: Path | None = None) -> float:
    """Return the seconds from SIGTERM to SIGKILL for the run in `output`.

    Based on the size of its newest checkpoint or, without one, of the model that it starts from.
    """
    size = _bytes(max((output / CHECKPOINTS_FOLDER).glob("step-*"), default=None))
    if not size and init_from is not None:
        size = CHECKPOINT_SHARE * _bytes(init_from / MODEL_FOLDER)
    return BASE_S + SAVES * size / WRITE_BYTES_PER_S if size else UNKNOWN_S


def _bytes(folder: Path | None) -> float:
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file()) if folder else 0
