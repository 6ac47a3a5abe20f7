"""Decode untrusted media in a separate process: `python -m fvlm_core.serve.decode`.

Decoders are C code that parses untrusted input. A process that crashes, hangs or uses too much memory is killed, and the server goes on.
Only self-contained formats are opened: ffmpeg would follow a playlist (HLS, concat) to files and addresses.
"""

import io
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from http import HTTPStatus
from threading import Event, Thread
from typing import Literal

import numpy as np
from PIL import Image

from fvlm_core.data.frames import MATROSKA, ClipError, FrameRule, extract_frames
from fvlm_core.eval.media import Images
from fvlm_core.serve.limits import MB, ClientDisconnectedError, Limits, RequestRejectedError

Kind = Literal["video", "image"]
FRAMES, REFUSED = b"frames\n", b"refused\n"
"""The first bytes of the process's output."""
LENGTH_TOLERANCE_S = 1.0
LOOK_S = 0.2
"""Interval of the check whether a decoding process has timed out or is no longer needed."""
FRAME_COPIES = 2
"""Copies of the frames that a process holds at the same time: one by one, and concatenated."""


def decode(content: bytes, kind: Kind, rule: FrameRule, limits: Limits, gone: Event) -> np.ndarray:
    """Decode a video or picture to frames uint8 [T, frame_px, frame_px, 3].

    Raises RequestRejectedError for media that cannot be decoded within the limits, ClientDisconnectedError once `gone` is set.
    """
    if not content:
        raise RequestRejectedError(f"the {kind} is empty")
    if container_of(content, kind) is None:
        known = "mp4, mov, mkv, webm, avi, ts, ogg, flv, wmv, gif" if kind == "video" else "jpeg, png, webp, bmp, gif"
        article = "an" if kind == "image" else "a"
        raise RequestRejectedError(
            f"not {article} {kind} of a known format ({known})", HTTPStatus.UNSUPPORTED_MEDIA_TYPE, code="unsupported_media"
        )
    settings = {"kind": kind, "rule": asdict(rule), "limits": asdict(limits)}
    command = [sys.executable, "-m", "fvlm_core.serve.decode", json.dumps(settings)]
    said = _output(command, content, limits.decode_s, gone)
    if said.startswith(FRAMES):
        return np.frombuffer(said, np.uint8, offset=len(FRAMES)).reshape(-1, rule.frame_px, rule.frame_px, 3).copy()
    if said.startswith(REFUSED):
        message, status = json.loads(said[len(REFUSED) :])
        raise RequestRejectedError(message, HTTPStatus(status), code="unreadable_media")
    what = f"the {kind} takes too much time or memory to decode"
    raise RequestRejectedError(what, HTTPStatus.UNPROCESSABLE_ENTITY, code="unreadable_media")


def _output(command: list[str], content: bytes, seconds: float, gone: Event) -> bytes:
    """Return a command's output; empty if it fails or exceeds `seconds`. Raises ClientDisconnectedError once `gone` is set."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    pipe, ends, done = subprocess.PIPE, time.monotonic() + seconds, Event()
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment) as process:

        def watch() -> None:
            while not done.wait(LOOK_S):
                if gone.is_set() or time.monotonic() > ends:
                    process.kill()
                    return

        watcher = Thread(target=watch, daemon=True)
        watcher.start()
        try:
            said = process.communicate(content)[0]
        finally:
            done.set()
            watcher.join()
    if gone.is_set():
        raise ClientDisconnectedError
    return said if process.returncode == 0 else b""


def container_of(content: bytes, kind: Kind) -> str | None:
    """The container or picture format according to the first bytes, or None if it is not supported."""
    if kind == "image":
        found = _PICTURES
    else:
        if content[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
            return "mov"
        if content[:1] == b"G" and content[188:189] == b"G" and content[376:377] in (b"G", b""):
            return "mpegts"
        found = _VIDEOS
    return next((name for mark, at, more, where, name in found if content.startswith(mark, at) and content.startswith(more, where)), None)


_PICTURES = (
    (b"\xff\xd8\xff", 0, b"", 0, "jpeg"),
    (b"\x89PNG\r\n\x1a\n", 0, b"", 0, "png"),
    (b"RIFF", 0, b"WEBP", 8, "webp"),
    (b"BM", 0, b"", 0, "bmp"),
    (b"GIF8", 0, b"", 0, "gif"),
)
_VIDEOS = (
    (b"\x1a\x45\xdf\xa3", 0, b"", 0, "matroska"),
    (b"RIFF", 0, b"AVI ", 8, "avi"),
    (b"GIF8", 0, b"", 0, "gif"),
    (b"OggS", 0, b"", 0, "ogg"),
    (b"FLV", 0, b"", 0, "flv"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", 0, b"", 0, "asf"),
    (b"\x00\x00\x01\xba", 0, b"", 0, "mpeg"),
)
"""(Bytes, their offset, more bytes, their offset, name of the format): both must match."""


def _main() -> None:
    """Decode standard input, with the settings and limits in the first argument."""
    settings = json.loads(sys.argv[1])
    limits, rule = Limits(**settings["limits"]), FrameRule(**settings["rule"])
    shown = rule.max_frames * rule.frame_px**2 * 3
    memory, seconds = limits.decode_mb * MB + FRAME_COPIES * shown, limits.decode_s
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    content = sys.stdin.buffer.read()
    try:
        if settings["kind"] == "image":
            frames = _image(content, rule, limits.pixels)
        else:
            frames = _video(content, rule, limits.pixels, limits.video_s)
    except RequestRejectedError as error:
        sys.stdout.buffer.write(REFUSED + json.dumps([error.message, int(error.status)]).encode())
        return
    sys.stdout.buffer.write(FRAMES)
    for frame in frames:  # one write takes at most 2 GiB
        sys.stdout.buffer.write(frame.tobytes())


def _image(content: bytes, rule: FrameRule, pixels: int) -> np.ndarray:
    Image.MAX_IMAGE_PIXELS = None  # `_check_pixels` applies our own limit before any pixel is decoded
    try:
        with Image.open(io.BytesIO(content)) as image:
            _check_pixels(image.width, image.height, pixels)
        return Images((content,)).load(rule, 1).frames
    except (ClipError, OSError, ValueError, SyntaxError) as error:
        raise RequestRejectedError("not a readable picture", HTTPStatus.UNPROCESSABLE_ENTITY) from error


def _video(content: bytes, rule: FrameRule, pixels: int, video_s: float) -> np.ndarray:
    import av
    import av.error

    try:
        with av.open(io.BytesIO(content), "r", metadata_errors="replace") as container:
            if not container.streams.video:
                raise RequestRejectedError("the file has no video stream", HTTPStatus.UNPROCESSABLE_ENTITY)
            stream = container.streams.video[0]
            _check_pixels(stream.codec_context.width, stream.codec_context.height, pixels)
            lengths = [float(stream.duration * stream.time_base)] if stream.duration and stream.time_base else []
            lengths += [container.duration / av.time_base] if container.duration else []
            if container.format.name == MATROSKA:  # these are times of the end, counted from 0
                lengths = [length - max(container.start_time or 0, 0) / av.time_base for length in lengths]
            if (length := max(lengths, default=0.0)) > video_s + LENGTH_TOLERANCE_S:
                what = f"the video is {length:.0f} s long; this server takes {video_s} s"
                raise RequestRejectedError(what, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        found = extract_frames(content, rule)
        if found.duration_s > video_s + LENGTH_TOLERANCE_S:
            what = f"the video is {found.duration_s:.0f} s long; this server takes {video_s} s"
            raise RequestRejectedError(what, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        return found.pixels
    except (ClipError, av.error.FFmpegError, ValueError) as error:
        if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):  # ffmpeg hit the memory limit; the video may be fine
            raise MemoryError from error
        reason = str(error) if isinstance(error, ClipError) else "it cannot be decoded"
        raise RequestRejectedError(f"not a readable video: {reason}", HTTPStatus.UNPROCESSABLE_ENTITY) from error


def _check_pixels(width: int, height: int, most: int) -> None:
    if width * height > most:
        what = f"pictures of {width} x {height} pixels are larger than this server takes ({most} pixels)"
        raise RequestRejectedError(what, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)


if __name__ == "__main__":
    _main()
