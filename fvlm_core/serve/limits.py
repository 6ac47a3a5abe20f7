"""Limits on requests from untrusted clients, and the errors that reject a request."""

from dataclasses import dataclass
from http import HTTPStatus

MB = 1_000_000


@dataclass(frozen=True)
class Limits:
    """Limits of one server. The defaults fit a machine with 8 GB of memory."""

    upload_mb: int = 32
    """Largest video or picture in MB, decoded from base64 or fetched; a request's body may be 1.5 times as large."""
    video_s: int = 1800
    """Longest video, in seconds."""
    pixels: int = 4096 * 2304
    """Most pixels (width times height) of a picture or a video's frame."""
    media: int = 8
    """Most videos and pictures in one request."""
    new_tokens: int = 1024
    """Most tokens of one answer."""
    running: int = 8
    """Answers that are decoded together in one batch."""
    waiting: int = 16
    """Requests that may wait in addition to those; further ones are rejected with status 429."""
    frames_at_once: int = 128
    """Frames that are encoded together, and the most in one request: DINOv2-small needs 10 MB per frame during prefill."""
    fetch_s: float = 30.0
    """Timeout for fetching an address, from the DNS look-up to the last byte."""
    body_s: float = 60.0
    """Timeout for receiving a request's body."""
    decode_s: int = 60
    """Timeout, in seconds, for decoding one video or picture."""
    decode_mb: int = 2000
    """Memory limit, in MB, for decoding one video or picture, not counting the frames that are kept."""
    allow_internal: bool = False
    """Allow addresses that lead to this machine or its private networks."""

    @property
    def upload_bytes(self) -> int:
        return self.upload_mb * MB

    @property
    def body_bytes(self) -> int:
        """Largest request body: base64 needs a third more than the media."""
        return self.upload_bytes * 3 // 2


class RequestRejectedError(Exception):
    """A rejected request: a message for the client, and the HTTP status."""

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST, *, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.message, self.status, self.code = message, status, code


class ClientDisconnectedError(RequestRejectedError):
    """The client has disconnected: nobody waits for the answer any more."""

    def __init__(self) -> None:
        super().__init__("the client has gone", HTTPStatus.REQUEST_TIMEOUT)
