"""What a server takes from strangers, and how it refuses the rest."""

from dataclasses import dataclass
from http import HTTPStatus

MB = 1_000_000


@dataclass(frozen=True)
class Limits:
    """Of one server. The defaults fit a machine with 8 GB."""

    upload_mb: int = 32
    """Of a video or picture, decoded from base64 or fetched; a request's body may be half as large again."""
    video_s: int = 1800
    """Length of a video."""
    pixels: int = 4096 * 2304
    """Of a picture of it."""
    media: int = 8
    """Videos and pictures in a request."""
    new_tokens: int = 1024
    """Of an answer."""
    running: int = 8
    """Answers that are computed together."""
    waiting: int = 16
    """Requests that wait beside them; more are refused with status 429."""
    frames_at_once: int = 128
    """Frames that are encoded together, so also those of a request: DINOv2-small keeps 10 MB of each while their questions are read."""
    fetch_s: float = 30.0
    """For fetching an address, from the first look-up to the last byte."""
    body_s: float = 60.0
    """For sending a request."""
    decode_s: int = 60
    """For decoding a video or picture."""
    decode_mb: int = 2000
    """Memory for it, beside the frames that are shown."""
    allow_internal: bool = False
    """Addresses may lead to this machine and its private networks."""

    @property
    def upload_bytes(self) -> int:
        return self.upload_mb * MB

    @property
    def body_bytes(self) -> int:
        """Of a request: base64 takes a third more."""
        return self.upload_bytes * 3 // 2


class RefusedError(Exception):
    """A request that is refused: why, in words for whom it is from, and the HTTP status."""

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST, *, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.message, self.status, self.code = message, status, code


class GoneError(RefusedError):
    """Nobody waits for the answer any more."""

    def __init__(self) -> None:
        super().__init__("the client has gone", HTTPStatus.REQUEST_TIMEOUT)
