"""Reads bytes from shards that may be on a slow or unreliable file system (a network volume).

Failed requests are retried. A sample that still cannot be read is treated as damaged: the loader counts and replaces it.
"""

import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fvlm_core.data.staging import Staging
from fvlm_core.errors import UserError

logger = logging.getLogger(__name__)

RETRY_DELAYS_S = (0.1, 1.0)
"""Delays before the retries of a failed request."""
GAP_BYTES = 64 * 1024
"""Samples at most this far apart are read with one request: reading the gap costs less than a round trip to a network volume."""
Span = tuple[int, int]
"""First byte, and one past the last."""


class CorruptSampleError(Exception):
    """A sample's bytes do not match the index, or cannot be read."""


class ShardFile:
    """A tar that stays open while in use. A staged copy is opened for each request instead, because it may be evicted."""

    def __init__(self, path: Path, staging: Staging | None = None) -> None:
        """Raises UserError if the file does not exist."""
        self.path, self.staging, self.descriptor = path, staging, -1
        if not path.is_file():
            raise UserError("a shard cannot be opened: it is not there", where=str(path), fix="make the shards again")

    def announce(self, offset: int, size: int) -> None:
        """Have the kernel start reading, if the file is read in place."""
        if self.staging is None:
            try:
                os.posix_fadvise(self._open(), offset, size, os.POSIX_FADV_WILLNEED)
            except OSError:  # only advice; `read` will report the error
                self._close()

    def read(self, offset: int, size: int) -> bytes:
        """Read a byte range. Raises CorruptSampleError, after retries if they may help."""
        problem = ""
        for delay_s in (*RETRY_DELAYS_S, None):
            try:
                content, length = self._read(offset, size)
                if len(content) == size:
                    return content
                if length < offset + size:
                    raise CorruptSampleError("the shard ends within the sample")
                problem = f"got {len(content)} of {size} bytes"
            except OSError as error:
                problem = error.strerror or str(error)
            self._close()
            if delay_s is not None:
                logger.warning("%s: %s; trying again", self.path, problem)
                time.sleep(delay_s)
        raise CorruptSampleError(f"the shard cannot be read: {problem}")

    def _read(self, offset: int, size: int) -> tuple[bytes, int]:
        """Return the bytes of one request, and the file's length, or 0 if the request was complete."""
        local = self.staging.open(self.path) if self.staging else None
        descriptor = self._open() if local is None else local
        try:
            content = os.pread(descriptor, size, offset)
            return content, 0 if len(content) == size else os.fstat(descriptor).st_size
        finally:
            if local is not None:
                os.close(local)

    def _open(self) -> int:
        if self.descriptor < 0:
            self.descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        return self.descriptor

    def _close(self) -> None:
        """Close the file; after an error, its handle may be stale."""
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            with suppress(OSError):
                os.close(descriptor)

    def __del__(self) -> None:
        self._close()


def spans(places: Mapping[int, Span]) -> list[tuple[Span, dict[int, Span]]]:
    """Merge the byte ranges of rows in one shard into requests: each is a range to read, with the rows in it."""
    requests: list[tuple[Span, dict[int, Span]]] = []
    for row, (first, last) in sorted(places.items(), key=lambda item: item[1]):
        if requests and first - requests[-1][0][1] <= GAP_BYTES:
            (start, end), wanted = requests[-1]
            requests[-1] = ((start, max(end, last)), wanted | {row: (first, last)})
        else:
            requests.append(((first, last), {row: (first, last)}))
    return requests
