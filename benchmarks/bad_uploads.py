"""Invalid and malicious uploads that a server must refuse. The server's tests send them too."""

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np


def bad_uploads(good: bytes, *, each: int, huge_bytes: int = 1_200_000) -> Iterator[tuple[str, bytes, str]]:
    """Yield (name, content, message part type) of `each` bad uploads of every kind, derived from the intact mp4 `good`. Deterministic.

    `huge_bytes` must exceed the server's upload limit.
    """
    rng = np.random.default_rng(0)
    hour = _hour()
    for n in range(each):
        noise = rng.bytes(2000 + n)
        cut = int(rng.integers(40, len(good) // 2))
        flipped = bytearray(good)
        for place in rng.integers(0, len(good), 400):
            flipped[place] ^= 0xFF
        yield "truncated", good[:cut], "video_url"
        yield "empty", b"", "video_url"
        yield "header only", good[: 16 + n], "video_url"
        yield "text", b"Dear server, this is no video. " * (n + 1), "video_url"
        yield "noise", noise, "video_url"
        yield "noise with an mp4's head", good[:32] + noise, "video_url"
        yield "damaged", bytes(flipped[:48]) + bytes(len(good) - 48), "video_url"
        yield "zip bomb", _zip_bomb(n), "video_url"
        yield "gzip bomb", gzip.compress(bytes(1_000_000 * (n + 1))), "video_url"
        yield "picture bomb", _png(30_000 + n, 30_000), "image_url"
        yield "video as a picture", good[n:], "image_url"
        yield "huge", good + bytes(huge_bytes + n), "video_url"
        yield "an hour long", hour + bytes(n), "video_url"
        yield "playlist", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n" + b"#" * n, "video_url"
        yield "concat script", b"ffconcat version 1.0\nfile '/etc/passwd'\n" + b"#" * n, "video_url"
        yield "sound only", _sound(n), "video_url"
        yield "web page", b"<!doctype html><title>404</title>" + b" " * n, "video_url"


def _hour() -> bytes:
    """An hour of black video at one frame per minute: small, and valid."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(1, 60), options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(61):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _zip_bomb(n: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"clip{n}.mp4", bytes(5_000_000))
    return buffer.getvalue()


def _png(width: int, height: int) -> bytes:
    """A PNG that declares very many pixels in a small file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


def _sound(n: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        for _ in range(4 + n):
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
