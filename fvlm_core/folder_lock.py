"""Whether another process holds the lock of an output folder. `fvlm_core.train.lock` takes the locks."""

import fcntl
import os
from pathlib import Path

LOCK_FILE = ".lock"


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder's lock."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
