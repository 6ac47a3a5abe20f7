"""Key-value stores of small files, in a folder or in a bucket. They hold the ledger, the board and the outcomes of pods.

A pod has the volume mounted as a folder; the user's machine reaches it only through its S3 API. Both write through this interface, so that
there is one format and there can be several writers.
"""

import os
import secrets
import socket
import threading
from pathlib import Path
from typing import Protocol


class Store(Protocol):
    """Files by key; a key is a path relative to the volume."""

    def read(self, key: str) -> bytes | None:
        """Return the content, or None if there is no such key."""
        ...

    def write(self, key: str, content: bytes) -> None:
        """Write the content atomically."""
        ...

    def keys(self, prefix: str) -> list[str]:
        """Return the sorted keys that begin with `prefix`, which ends in a slash."""
        ...


class FolderStore:
    """A store on a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, key: str) -> bytes | None:
        try:
            return (self.folder / key).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, key: str, content: bytes) -> None:
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            with new.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    def keys(self, prefix: str) -> list[str]:
        files = (self.folder / prefix).rglob("*")
        return sorted(file.relative_to(self.folder).as_posix() for file in files if file.is_file() and not file.name.startswith("."))


class Journal:
    """An append-only journal of lines for any number of concurrent writers on any hosts.

    Neither S3 nor a network file system lets two hosts append to one file. So each writer has its own file, and readers merge them by
    time.
    """

    def __init__(self, store: Store, folder: str, *, writer: str = "") -> None:
        """`writer` is a globally unique name; by default it is made of host name, process id and a random number."""
        self.store, self.folder = store, folder.rstrip("/")
        self.writer = writer or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._mine: bytes | None = None
        self._lock = threading.Lock()

    def append(self, line: str) -> None:
        """Append a line, which must not contain line breaks. When this returns, all readers can see it."""
        if "\n" in line:
            raise ValueError("one line at a time")
        key = f"{self.folder}/{self.writer}.jsonl"
        with self._lock:
            if self._mine is None:
                self._mine = self.store.read(key) or b""
            content = self._mine + line.encode() + b"\n"
            self.store.write(key, content)
            self._mine = content

    def lines(self) -> list[str]:
        """Return the lines of all writers, one writer after the other, each in the order of writing."""
        found = []
        for key in self.store.keys(f"{self.folder}/"):
            content = self.store.read(key) or b""
            # not `splitlines`, which also splits at characters that JSON leaves as they are, such as U+2028
            found += [line for line in content.decode(errors="replace").split("\n") if line]
        return found
