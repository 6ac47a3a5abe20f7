"""Finds files in archives: an index of the members of zip and tar archives, kept on disk because there may be millions.

An address matches a member if both have the same file name and one of the two paths ends with the other: datasets unpack some archives
into folders that the archive does not contain, and vice versa.
"""

import io
import re
import sqlite3
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from fvlm_core.data.media import JoinedFiles, is_web, range_reference
from fvlm_core.errors import UserError

CUT = re.compile(r"(?P<archive>.+?)(?:part[a-z]{2}|\.(?:part)?\d+)")
"""Name of a part of a split archive, e.g. `OpenVid_part73_partaa` or `clips.zip.001`."""
BUFFER_BYTES = 1 << 16
GZIP = b"\x1f\x8b"
TAR_MAGIC, TAR_MAGIC_OFFSET = b"ustar", 257


class AmbiguousMemberError(Exception):
    """Several members match an address."""


class Archives:
    """The members of archives. Use as a context manager: leaving it deletes the index file."""

    def __init__(self, paths: Sequence[Path | str], index: Path) -> None:
        """`paths`: local archives, and addresses of zip files on the web. `index`: where to write the index.

        Raises UserError for a file that is not an archive, or whose members cannot be read individually.
        """
        index.unlink(missing_ok=True)
        self._index = index
        self._known = sqlite3.connect(index, isolation_level=None)
        self._known.execute("PRAGMA journal_mode = OFF")
        self._known.execute("PRAGMA synchronous = OFF")
        self._known.execute("CREATE TABLE members (name TEXT, path TEXT, reference TEXT)")
        self._known.execute("BEGIN")
        for parts in joined(paths):
            members = ((path.rpartition("/")[2], path, reference) for path, reference in _members(parts))
            self._known.executemany("INSERT INTO members VALUES (?, ?, ?)", members)
        self._known.execute("CREATE INDEX by_name ON members (name)")
        self._known.execute("COMMIT")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._known.close()
        self._index.unlink(missing_ok=True)

    def find(self, address: str) -> str | None:
        """Return the reference of the member that matches a relative address, or None.

        Raises AmbiguousMemberError if members with different paths match equally well.
        """
        name = address.rpartition("/")[2]
        found = self._known.execute("SELECT path, reference FROM members WHERE name = ? ORDER BY rowid", (name,)).fetchall()
        fitting = {path: reference for path, reference in reversed(found) if f"/{path}".endswith(f"/{address}") or _ends(address, path)}
        if len(fitting) > 1 and address not in fitting:
            raise AmbiguousMemberError(f"{len(fitting)} files in the archives may be meant, e.g. {' and '.join(sorted(fitting)[:2])}")
        return fitting.get(address) or next(iter(fitting.values()), None)


def joined(paths: Sequence[Path | str]) -> list[list[str]]:
    """Group the files by archive: a single file, or the parts of a split archive, sorted by name."""
    groups: dict[str, list[str]] = {}
    for path in map(str, paths):
        folder, _, name = path.rpartition("/")
        cut = None if name.lower().endswith((".zip", ".tar")) else CUT.fullmatch(name)
        groups.setdefault(f"{folder}/{cut['archive']}" if cut else path, []).append(path)
    return [sorted(parts) for parts in groups.values()]


def _ends(address: str, path: str) -> bool:
    return f"/{address}".endswith(f"/{path}")


def _members(parts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield path and reference of every file in an archive."""
    where = ", ".join(parts)
    try:
        raw = JoinedFiles(parts)
    except OSError as error:
        raise UserError(f"the archive cannot be opened: {error}", where=where, fix="check its path or address") from error
    with raw, io.BufferedReader(raw, BUFFER_BYTES) as stream:
        start = stream.read(tarfile.BLOCKSIZE)
        stream.seek(0)
        if start.startswith(GZIP):
            fix = "unpack it once with gunzip (a tar of videos stays as large), and name the .tar"
            raise UserError("a compressed tar: its files cannot be reached one by one", where=where, fix=fix)
        try:
            if start[TAR_MAGIC_OFFSET:].startswith(TAR_MAGIC):
                if any(map(is_web, parts)):
                    fix = "download it, and name the file in `archives`"
                    raise UserError("a tar on the web: it has no table of what is in it", where=where, fix=fix)
                with tarfile.open(fileobj=stream, mode="r:") as archive:
                    for member in archive:
                        if member.isfile():
                            reference = range_reference(parts, raw.sizes, member.offset_data, member.size, header=False)
                            yield member.name.removeprefix("./"), reference
                        archive.members = []  # ty: ignore[missing-attribute] -- tarfile would keep them all in memory
                return
            with zipfile.ZipFile(stream) as archive:
                for member in archive.infolist():
                    if not member.is_dir():
                        reference = range_reference(parts, raw.sizes, member.header_offset, member.compress_size, header=True)
                        yield member.filename.removeprefix("./"), reference
        except (zipfile.BadZipFile, tarfile.TarError, OSError) as error:
            raise UserError(
                f"not a readable zip or tar archive: {error}", where=where, fix="download it again; parts of one archive must all be there"
            ) from error
