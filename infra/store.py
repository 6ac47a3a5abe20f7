"""Small files by key, on a folder or in a bucket: what the ledger, the board and the outcomes of pods are kept in.

A pod has the volume as a folder; at home there is only the volume's S3 side. Both are written through here, so that whatever is kept has
one form and several writers.
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
        """The content, or None where there is none."""
        ...

    def write(self, key: str, content: bytes) -> None:
        """All of it or nothing."""
        ...

    def keys(self, prefix: str) -> list[str]:
        """The keys that begin with `prefix`, which ends in a slash; sorted."""
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
    """Lines that are only ever added, by any number of writers at once, wherever each of them is.

    Neither S3 nor a network file system lets two hosts append to one file. So each writer has a file of its own, which nobody else
    writes, and readers merge them by time.
    """

    def __init__(self, store: Store, folder: str, *, writer: str = "") -> None:
        """`writer`: unique in all the world; by default made of host, process and chance."""
        self.store, self.folder = store, folder.rstrip("/")
        self.writer = writer or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._mine: bytes | None = None
        self._lock = threading.Lock()

    def append(self, line: str) -> None:
        """Add a line (without line breaks). It is there for all readers when this returns."""
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
        """Everybody's lines: each writer's in their order, one writer after the other."""
        found = []
        for key in self.store.keys(f"{self.folder}/"):
            content = self.store.read(key) or b""
            found += content.decode(errors="replace").splitlines()
        return found
