"""What a volume knows of itself: an id of its own, the password of its server, and where the server's database may be.

The id names the volume wherever two of them meet: in the tags and queues of a shared Prefect server, and in the marks on processes.
A path would not do: two hosts can have different volumes at the same path.
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
"""Beginnings of their names. SQLite's write-ahead log needs memory that its processes share and locks that hold; there it has neither."""
LOCAL_FUSE = ("fuse.fuse-overlayfs", "fuse.overlayfs")


def volume_id(volume: Path) -> str:
    """The volume's random id; made when it is asked for the first time. A copy of a volume has the id of the original."""
    return _made_once(volume / HOME / ID_FILE, lambda: secrets.token_hex(6))


def known_volume_id(volume: Path) -> str | None:
    """The volume's id, or None where it has none, or where the volume is not on this host."""
    try:
        return (volume / HOME / ID_FILE).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None


def password(volume: Path) -> str:
    """Of the volume's Prefect server, in the form that Prefect's settings and its login page take; made once."""
    return _made_once(volume / HOME / PASSWORD_FILE, lambda: f"{USER}:{secrets.token_urlsafe(24)}")


def database_folder(volume: Path, state: Path) -> Path:
    """Where the server's SQLite database can be: on the volume, or in a folder of the user's `state` if the volume is on a network."""
    home = volume / HOME
    return state / "fvlm" / volume_id(volume) if is_network_file_system(home) else home


def is_network_file_system(path: Path) -> bool:
    """Whether the path is on a file system of another machine, or one that only looks like a local one."""
    path = path.resolve()
    around = [one for one in psutil.disk_partitions(all=True) if path.is_relative_to(one.mountpoint)]
    kind = max(around, key=lambda one: len(one.mountpoint)).fstype if around else ""  # of equals the last: it is mounted over the others
    return kind.startswith(NETWORK_FILE_SYSTEMS) and kind not in LOCAL_FUSE


def _made_once(path: Path, make: Callable[[], str]) -> str:
    """The file's text; the first of all processes to ask makes it, readable by the user alone."""
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
