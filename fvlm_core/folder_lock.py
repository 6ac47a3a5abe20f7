"""Whether another process holds the lock of an output folder. `fvlm_core.train.lock` takes the locks."""

import fcntl
import os
from pathlib import Path

LOCK_FILE = ".lock"


def is_held(folder: Path) -> bool:
    """Whether a process on this machine holds the folder's lock. Leases on shared volumes (`RunLock` with `shared`) are not seen."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # needs no writable descriptor, also on NFS
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
