"""A volume's id, the password of its Prefect server, and the location of that server's database.

The id tells volumes apart in the tags and queues of a shared Prefect server and in the marks on processes. A path would not, because two
hosts can have different volumes at the same path.
"""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import psutil

from infra.locks import locked

HOME = "prefect"
"""Folder of the volume that belongs to Prefect: password, database, results, logs."""
ID_FILE, PASSWORD_FILE = "volume-id", "password"
USER = "fvlm"
"""Prefect's password has the form USER:SECRET."""
NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "virtiofs", "ceph", "gluster", "lustre", "gpfs", "beegfs", "afs", "fuse.")
"""Prefixes of file-system types. SQLite's write-ahead log needs shared memory and reliable locks, which these do not offer."""
LOCAL_FUSE = ("fuse.fuse-overlayfs", "fuse.overlayfs")


def volume_id(volume: Path) -> str:
    """Return the volume's random id, which is created on first use. A copy of a volume has the id of the original."""
    return _made_once(volume / HOME / ID_FILE, lambda: secrets.token_hex(6))


def known_volume_id(volume: Path) -> str | None:
    """Return the volume's id, or None if it has none yet or is not on this host."""
    try:
        return (volume / HOME / ID_FILE).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None


def password(volume: Path) -> str:
    """Return the password of the volume's Prefect server, in the form that Prefect's settings and login page expect. It is created once."""
    return _made_once(volume / HOME / PASSWORD_FILE, lambda: f"{USER}:{secrets.token_urlsafe(24)}")


def database_folder(volume: Path, state: Path) -> Path:
    """Return the folder for the server's SQLite database: on the volume or, if that is on a network file system, in the user's `state`."""
    home = volume / HOME
    return state / "fvlm" / volume_id(volume) if is_network_file_system(home) else home


def is_network_file_system(path: Path) -> bool:
    """Return whether the path is on a network file system. FUSE file systems (`fuse.*`) count as such, except `LOCAL_FUSE`."""
    path = path.resolve()
    around = [one for one in psutil.disk_partitions(all=True) if path.is_relative_to(one.mountpoint)]
    around.reverse()  # of several mounts at one mount point, the last hides the others, and `max` returns the first
    kind = max(around, key=lambda one: len(one.mountpoint)).fstype if around else ""
    return kind.startswith(NETWORK_FILE_SYSTEMS) and kind not in LOCAL_FUSE


def _made_once(path: Path, make: Callable[[], str]) -> str:
    """Return the file's text. The first process that asks creates the file, readable by its user only."""
    if not path.exists():
        with locked(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                new = path.with_name(f".{path.name}.new")
                new.unlink(missing_ok=True)
                with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
                    stream.write(make())
                    stream.flush()
                    os.fsync(stream.fileno())
                new.replace(path)
    return path.read_text()
