"""References to media, and how they are opened: a file, a member of a zip or tar archive, a cell of a parquet file.

A reference is one line of text that says where bytes lie, so that a row of a table holds it and any process opens it:

| reference | bytes |
|---|---|
| `/folder/clip.mp4` | a file |
| `bytes:OFFSET+SIZE:/folder/part.tar` | a part of a file: how a tar, and a zip that does not compress, keep a member |
| `zip:OFFSET+SIZE:/folder/part.zip` | a member of a zip by its local header; SIZE is that of its content in the zip |
| `parquet:ROW:ITEM:COLUMN:/folder/train.parquet` | a column's value in a row (from 0); ITEM is its place in a list, else empty |

An archive that was cut into parts is named by the parts that a member lies in, separated by tabs. Several images of one sample are
several references, a line each; they are read as a tar of images. An address may end with `#t=START,END`: the seconds of the video that
are meant (the temporal dimension of W3C Media Fragments 1.0).

Needs nothing but pyarrow, since video2dataset's environment imports it too.
"""

import io
import os
import re
import struct
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as pq

RANGE = re.compile(r"(bytes|zip):(\d+)\+(\d+):(.+)", re.DOTALL)
CELL = re.compile(r"parquet:(\d+):(\d*):([^:]+):(.+)", re.DOTALL)
SECONDS = re.compile(r"[#&]t=(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)$")
NEXT, PART = "\n", "\t"
"""Between the references of a sample, and between the parts of a cut archive."""
ZIP_HEADER = struct.Struct("<4s2xHH16xHH")
"""Signature, flags, method, and the lengths of the name and the extra field of a local header (APPNOTE 4.3.7); 4 + 26 bytes."""
ZIP_SIGNATURE, STORED, DEFLATED, ENCRYPTED = b"PK\x03\x04", 0, 8, 1
CACHE_BYTES = 512 << 20
"""Of row groups of parquet files that are kept decompressed; neighbours in a table are asked for one after the other."""
BUFFER_BYTES = 1 << 20


class MediaError(Exception):
    """Why a reference gives no bytes, in words for the owner of the data."""


def time_window(address: str) -> tuple[float, float] | None:
    """The seconds that an address is limited to by `#t=START,END`, or None."""
    found = SECONDS.search(address)
    return (float(found[1]), float(found[2])) if found else None


def without_window(address: str) -> str:
    """The address of the complete video."""
    return SECONDS.sub("", address)


def files_of(reference: str) -> list[str]:
    """The files that a reference needs."""
    found: dict[str, None] = {}
    for one in reference.split(NEXT):
        match = RANGE.fullmatch(one) or CELL.fullmatch(one)
        found |= dict.fromkeys(match[4].split(PART) if match else [one])
    return list(found)


def cell_reference(path: str, column: str, row: int, item: int | None) -> str:
    """A value of a parquet file; `item` of a list, or None."""
    return f"parquet:{row}:{'' if item is None else item}:{column}:{path}"


def range_reference(parts: Sequence[str], sizes: Sequence[int], offset: int, size: int, *, header: bool) -> str:
    """`size` bytes at `offset` of the files `parts` joined; with `header`, those after the local header of a zip at `offset`.

    Only the parts that the bytes lie in are named.
    """
    first, end, start = 0, offset + size, 0
    slack = 1 << 17 if header else 0  # a local header and its two fields of at most 64 KiB
    chosen = []
    for part, length in zip(parts, sizes, strict=True):
        if start + length > offset and start < end + slack:
            first = start if not chosen else first
            chosen.append(part)
        start += length
    return f"{'zip' if header else 'bytes'}:{offset - first}+{size}:{PART.join(chosen)}"


def read_media(reference: str) -> bytes:
    """The bytes of a reference; of several, a tar of them in order. Raises MediaError."""
    stream, _ = open_media(reference)
    with stream:
        return stream.read()


def open_media(reference: str) -> tuple[BinaryIO, int]:
    """A stream of a reference's bytes, and how many there are. A file is not read before the stream is. Raises MediaError."""
    try:
        if NEXT in reference:
            content = _tar([read_media(one) for one in reference.split(NEXT)])
        elif match := RANGE.fullmatch(reference):
            content = _read_range(match[1], int(match[2]), int(match[3]), match[4].split(PART))
        elif match := CELL.fullmatch(reference):
            content = _CELLS.read(match[4], match[3], int(match[1]), int(match[2]) if match[2] else None)
        else:
            stream = open(reference, "rb")  # noqa: SIM115 -- closed by whoever reads it
            return stream, os.fstat(stream.fileno()).st_size
    except FileNotFoundError as error:
        raise MediaError("file not found") from error
    except OSError as error:
        raise MediaError(f"cannot be read: {error}") from error
    return io.BytesIO(content), len(content)


class JoinedFiles(io.RawIOBase):
    """Files read as if they were one, in their order: an archive that was cut into parts."""

    def __init__(self, paths: Sequence[Path | str]) -> None:
        self._stack = ExitStack()
        self._files: list[BinaryIO] = [self._stack.enter_context(open(path, "rb")) for path in paths]  # noqa: SIM115 -- close() does
        self.sizes = [os.fstat(file.fileno()).st_size for file in self._files]
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: sum(self.sizes)}[whence])
        return self._place

    def readinto(self, buffer: Any) -> int:
        start = 0
        for file, size in zip(self._files, self.sizes, strict=True):
            if start <= self._place < start + size:
                content = os.pread(file.fileno(), min(len(buffer), start + size - self._place), self._place - start)
                buffer[: len(content)] = content
                self._place += len(content)
                return len(content)
            start += size
        return 0

    def close(self) -> None:
        self._stack.close()
        super().close()


def _read_range(kind: str, offset: int, size: int, parts: Sequence[str]) -> bytes:
    with io.BufferedReader(JoinedFiles(parts), BUFFER_BYTES) as stream:
        stream.seek(offset)
        method = STORED
        if kind == "zip":
            method = _skip_header(stream)
        content = stream.read(size)
    if len(content) < size:
        raise MediaError("the archive ends within the file")
    if method == STORED:
        return content
    try:
        return zlib.decompress(content, -zlib.MAX_WBITS)
    except zlib.error as error:
        raise MediaError(f"damaged in its zip archive: {error}") from error


def _skip_header(stream: BinaryIO) -> int:
    """Skip a zip's local header; returns the method of compression."""
    header = stream.read(ZIP_HEADER.size)
    if len(header) < ZIP_HEADER.size:
        raise MediaError("the archive ends within the file")
    signature, flags, method, name, extra = ZIP_HEADER.unpack(header)
    if signature != ZIP_SIGNATURE:
        raise MediaError("the zip archive has changed: there is no file at that place")
    if flags & ENCRYPTED or method not in (STORED, DEFLATED):
        raise MediaError("the zip archive is encrypted" if flags & ENCRYPTED else f"the zip archive's compression ({method}) is not known")
    stream.seek(name + extra, os.SEEK_CUR)
    return method


def _tar(contents: Sequence[bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for number, content in enumerate(contents):
            info = tarfile.TarInfo(f"{number:03d}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return made.getvalue()


class _Cells:
    """Reads values out of parquet files. Row groups stay decompressed while they fit; larger ones are read a row at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[str, int, str], Any] = OrderedDict()

    def read(self, path: str, column: str, row: int, item: int | None) -> bytes:
        try:
            with self._lock:  # a column is decompressed once, whichever thread asks for it first
                value = self._value(path, column, row)
        except (ValueError, KeyError, IndexError) as error:
            raise MediaError(f"the parquet file cannot be read: {error}") from error
        if item is not None:
            value = value[item] if value is not None and item < len(value) else None
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise MediaError(f"the column {column} holds no bytes there")
        return content

    def _value(self, path: str, column: str, row: int) -> Any:
        file = pq.ParquetFile(path, buffer_size=BUFFER_BYTES)
        with file:
            group, place = _group_of(file, row)
            key = (path, group, column)
            if key not in self._groups:
                if _bytes_of(file, group, column) > CACHE_BYTES // 4:
                    rows = file.iter_batches(1, row_groups=[group], columns=[column], use_threads=False)
                    return next(batch for number, batch in enumerate(rows) if number == place).column(0)[0].as_py()
                self._groups[key] = file.read_row_group(group, columns=[column], use_threads=False).column(0)
        self._groups.move_to_end(key)
        while len(self._groups) > 1 and sum(one.nbytes for one in self._groups.values()) > CACHE_BYTES:
            self._groups.popitem(last=False)
        return self._groups[key][place].as_py()


_CELLS = _Cells()


def _group_of(file: pq.ParquetFile, row: int) -> tuple[int, int]:
    """The row group of a row, and its place there."""
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if row < rows:
            return group, row
        row -= rows
    raise IndexError("it has fewer rows")


def _bytes_of(file: pq.ParquetFile, group: int, column: str) -> int:
    """Decompressed size of a column in a row group."""
    chunks = [file.metadata.row_group(group).column(number) for number in range(file.metadata.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
