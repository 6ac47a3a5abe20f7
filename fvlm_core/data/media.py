"""References to media, and how to open them: a file, a member of a zip or tar archive, or a cell of a parquet file.

A reference is one line of text that says where the bytes are, so it can be stored in a table and opened by any process:

| reference | bytes |
|---|---|
| `/folder/clip.mp4` | a file |
| `bytes:OFFSET+SIZE:/folder/part.tar` | a byte range of a file, e.g. a member of a tar |
| `zip:OFFSET+SIZE:/folder/part.zip` | a member of a zip, at its local header; SIZE is its compressed size |
| `parquet:ROW:ITEM:COLUMN:/folder/train.parquet` | a column's value in a row (from 0); ITEM is its index in a list, else empty |

An archive may also be on the web or in an object store: its address takes the place of the file, and only the necessary bytes are
fetched. For a split archive, the parts that contain the member are named, separated by tabs. Several images of one sample are several
references, one per line; they are read as a tar of images. An address may end with `#t=START,END`: only these seconds of the video are
used (the temporal dimension of W3C Media Fragments 1.0).

Needs only pyarrow, because video2dataset's environment imports it too.
"""

import http.client
import io
import os
import re
import struct
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import cache
from http import HTTPStatus
from typing import Any, BinaryIO

from pyarrow.fs import FileSystem

from fvlm_core.data.cells import Cells

RANGE = re.compile(r"(bytes|zip):(\d+)\+(\d+):(.+)", re.DOTALL)
CELL = re.compile(r"parquet:(\d+):(\d*):([^:]+):(.+)", re.DOTALL)
SECONDS = re.compile(r"[#&]t=(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)$")
NEXT, PART = "\n", "\t"
"""Separators of the references of a sample, and of the parts of a split archive."""
ZIP_HEADER = struct.Struct("<4s2xHH16xHH")
"""Signature, flags, method, and the lengths of the name and the extra field of a local header (APPNOTE 4.3.7); 4 + 26 bytes."""
ZIP_SIGNATURE, STORED, DEFLATED, ENCRYPTED = b"PK\x03\x04", 0, 8, 1
BUFFER_BYTES = 1 << 20
CUT_SHORT = "the archive ends within the file"
STORE = "s3://"
WEB_TIMEOUT_S, WEB_TRIES, WEB_PAUSE_S = 60.0, 3, 1.0
"""Timeout, tries, and pause between tries of a request for a part of an archive on the web."""
USUAL_HEADER_BYTES = 512
"""Enough for nearly every local header of a zip with its two fields; fetched together with the content."""


class MediaError(Exception):
    """A reference gives no bytes. The message tells the owner of the data why."""


class UnreachableError(MediaError):
    """The bytes cannot be read now, but perhaps later."""


def time_window(address: str) -> tuple[float, float] | None:
    """Return START and END in seconds if an address ends with `#t=START,END`, else None."""
    found = SECONDS.search(address)
    return (float(found[1]), float(found[2])) if found else None


def without_window(address: str) -> str:
    """Return the address without `#t=START,END`: that of the complete video."""
    return SECONDS.sub("", address)


def is_web(place: str) -> bool:
    """Whether an archive is on the web or in an object store."""
    return place.startswith(("http://", "https://", STORE))


def files_of(reference: str) -> list[str]:
    """Return the files that a reference needs."""
    found: dict[str, None] = {}
    for one in reference.split(NEXT):
        match = RANGE.fullmatch(one) or CELL.fullmatch(one)
        found |= dict.fromkeys(match[4].split(PART) if match else [one])
    return list(found)


def cell_reference(path: str, column: str, row: int, item: int | None) -> str:
    """Return the reference of a value in a parquet file; `item` is an index if the value is a list, else None."""
    return f"parquet:{row}:{'' if item is None else item}:{column}:{path}"


def range_reference(parts: Sequence[str], sizes: Sequence[int], offset: int, size: int, *, header: bool) -> str:
    """Return the reference of `size` bytes at `offset` of the concatenated files `parts`.

    With `header`, a zip's local header is at `offset`, and the bytes follow it. Only the parts that contain the bytes are named.
    """
    first, end, start = 0, offset + max(size, 1), 0
    slack = 1 << 17 if header else 0  # a local header and its two fields of at most 64 KiB
    chosen = []
    for part, length in zip(parts, sizes, strict=True):
        if start + length > offset and start < end + slack:
            first = start if not chosen else first
            chosen.append(part)
        start += length
    return f"{'zip' if header else 'bytes'}:{offset - first}+{size}:{PART.join(chosen)}"


def read_media(reference: str) -> bytes:
    """Return the bytes of a reference; for several references, a tar of them in order. Raises MediaError."""
    stream, _ = open_media(reference)
    with stream:
        return stream.read()


def open_media(reference: str) -> tuple[BinaryIO, int]:
    """Return a stream of a reference's bytes, and their number. A file is only read when the stream is read.

    Raises MediaError, or UnreachableError if a retry may help.
    """
    try:
        if NEXT in reference:
            content = _tar([read_media(one) for one in reference.split(NEXT)])
        elif match := RANGE.fullmatch(reference):
            return _open_range(match[1], int(match[2]), int(match[3]), match[4].split(PART))
        elif match := CELL.fullmatch(reference):
            content = _read_cell(match[4], match[3], int(match[1]), int(match[2]) if match[2] else None)
        else:
            stream = open(reference, "rb")  # noqa: SIM115 -- the caller closes it
            return stream, os.fstat(stream.fileno()).st_size
    except FileNotFoundError as error:
        raise MediaError("file not found") from error
    except OSError as error:
        raise UnreachableError(f"cannot be read: {error}") from error
    return io.BytesIO(content), len(content)


class JoinedFiles(io.RawIOBase):
    """Files, local or on the web, read as one in the given order, e.g. a split archive. Can be limited to a range of bytes."""

    def __init__(self, places: Sequence[str]) -> None:
        self._stack = ExitStack()
        self._parts = [self._stack.enter_context(closing(_part(place))) for place in places]
        self.sizes = [part.size for part in self._parts]
        self._place, self._end = 0, sum(self.sizes)

    def narrow(self, offset: int, size: int) -> None:
        """Seek to `offset`, and end `size` bytes after it."""
        self._place, self._end = offset, offset + size

    def widen(self, end: int) -> None:
        """Move the end to `end` if that is later."""
        self._end = max(self._end, end)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._end}[whence])
        return self._place

    def readinto(self, buffer: Any) -> int:
        start = 0
        for part in self._parts:
            if start <= self._place < start + part.size:
                content = part.read(self._place - start, min(len(buffer), start + part.size - self._place, self._end - self._place))
                buffer[: len(content)] = content
                self._place += len(content)
                return len(content)
            start += part.size
        return 0

    def close(self) -> None:
        self._stack.close()
        super().close()


def _read_cell(path: str, column: str, row: int, item: int | None) -> bytes:
    try:
        return _CELLS.read(path, column, row, item)
    except (ValueError, KeyError, IndexError) as error:
        raise MediaError(f"the parquet file cannot be read: {error}") from error


_CELLS = Cells()


def _part(place: str) -> "_FilePart | _WebPart | _StorePart":
    """Open a file, local or remote."""
    if place.startswith(STORE):
        return _StorePart(place)
    return _WebPart(place) if is_web(place) else _FilePart(place)


class _FilePart:
    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def close(self) -> None:
        os.close(self._descriptor)


class _WebPart:
    def __init__(self, address: str) -> None:
        self._address, self.size = address, _web_size(address)

    def read(self, offset: int, size: int) -> bytes:
        return _web_range(self._address, offset, size)[0] if size else b""

    def close(self) -> None:
        """Nothing stays open."""


class _StorePart:
    """An object in an S3-compatible store."""

    def __init__(self, address: str) -> None:
        store, path = FileSystem.from_uri(address)
        self._file = store.open_input_file(path)
        self.size = self._file.size()

    def read(self, offset: int, size: int) -> bytes:
        return self._file.read_at(size, offset)

    def close(self) -> None:
        self._file.close()


@cache
def _web_size(address: str) -> int:
    """Size of a file on the web. Requested once per process: published archives do not change."""
    return _web_range(address, 0, 1)[1]


def _web_range(address: str, offset: int, size: int) -> tuple[bytes, int]:
    """Return a byte range of a file on the web, and the file's size. Raises OSError.

    Hugging Face redirects every request to a store, and limits the number of redirects (3,000 in 5 minutes without an account, too few for
    a million videos). So the target of a redirect is reused until it refuses a request, which it does after an hour.
    """
    asked = {"Range": f"bytes={offset}-{offset + size - 1}", "User-Agent": "fvlm"}
    forwarded = _FORWARDED.get(address)
    places = [*([forwarded] if forwarded else []), *([address] * WEB_TRIES)]
    for left, place in zip(reversed(range(len(places))), places, strict=True):
        try:
            with urllib.request.urlopen(urllib.request.Request(place, headers=asked), timeout=WEB_TIMEOUT_S) as answer:
                if answer.status != HTTPStatus.PARTIAL_CONTENT:
                    raise OSError(f"{address} does not answer with parts of files (HTTP ranges)")
                content = answer.read()
                if answer.url != address:
                    _FORWARDED[address] = answer.url
                return content, int(answer.headers["Content-Range"].rpartition("/")[2])
        except urllib.error.HTTPError as error:
            if place == address and (not left or error.code < HTTPStatus.INTERNAL_SERVER_ERROR):
                raise OSError(f"HTTP {error.code} {error.reason}: {address}") from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            if not left:
                raise OSError(f"ConnectionError: {error}: {address}") from error
        if place == address:
            time.sleep(WEB_PAUSE_S)
        else:
            _FORWARDED.pop(address, None)
    raise AssertionError


_FORWARDED: dict[str, str] = {}
"""Target of the last redirect of each address."""


def _open_range(kind: str, offset: int, size: int, parts: Sequence[str]) -> tuple[BinaryIO, int]:
    """Open a byte range of joined files. Compressed members of a zip are decompressed, and web content is fetched, immediately."""
    raw, web = JoinedFiles(parts), any(map(is_web, parts))
    try:
        raw.seek(offset)
        stream = raw
        if web:  # header and content in one request
            raw.narrow(offset, size + USUAL_HEADER_BYTES)
            stream = io.BufferedReader(raw, size + USUAL_HEADER_BYTES)
        method = _skip_header(stream) if kind == "zip" else STORED
        raw.widen(stream.tell() + size)
        if stream.tell() + size > sum(raw.sizes):
            raise MediaError(CUT_SHORT)
        if method == STORED and not web:
            raw.narrow(raw.tell(), size)
            return io.BufferedReader(raw, BUFFER_BYTES), size
        content = _read_exactly(stream, size)
        found = content if method == STORED else zlib.decompress(content, -zlib.MAX_WBITS)
    except zlib.error as error:
        raw.close()
        raise MediaError(f"damaged in its zip archive: {error}") from error
    except BaseException:
        raw.close()
        raise
    raw.close()
    return io.BytesIO(found), len(found)


def _read_exactly(raw: "JoinedFiles | io.BufferedReader[JoinedFiles]", size: int) -> bytes:
    """Read exactly `size` bytes, across parts. Raises MediaError if there are fewer."""
    content = bytearray()
    while len(content) < size:
        some = raw.read(size - len(content))
        if not some:
            raise MediaError(CUT_SHORT)
        content += some
    return bytes(content)


def _skip_header(raw: "JoinedFiles | io.BufferedReader[JoinedFiles]") -> int:
    """Skip a zip's local header; returns the compression method."""
    signature, flags, method, name, extra = ZIP_HEADER.unpack(_read_exactly(raw, ZIP_HEADER.size))
    if signature != ZIP_SIGNATURE:
        raise MediaError("the zip archive has changed: there is no file at that place")
    if flags & ENCRYPTED or method not in (STORED, DEFLATED):
        raise MediaError("the zip archive is encrypted" if flags & ENCRYPTED else f"the zip archive's compression ({method}) is not known")
    raw.seek(name + extra, os.SEEK_CUR)
    return method


def _tar(contents: Sequence[bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for number, content in enumerate(contents):
            info = tarfile.TarInfo(f"{number:03d}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return made.getvalue()
