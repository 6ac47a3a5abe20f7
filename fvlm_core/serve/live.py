"""Frames of a file, a camera or a network stream at a fixed rate, without holding the video in memory.

One picture is decoded at a time. Of a file, the frames are those that `fvlm_core.data.frames` would choose without a limit, and one more if
the video ends between two sampling times: a stream's length is not known in advance. A live source (a camera or an address) does not wait
for its reader, so a thread goes on reading while a frame is processed, and only the newest of the frames that arrive meanwhile is kept.
"""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np

from fvlm_core.data.frames import START_TOLERANCE_S, _pixel_aspect, _square
from fvlm_core.errors import UserError

CAMERA = "/dev/video"
TIMEOUT_S = 15.0
"""Timeout for an address to answer, and for each further packet."""


@dataclass(frozen=True)
class LiveFrame:
    """One frame of a source."""

    time_s: float
    """Seconds since the first frame."""
    pixels: np.ndarray
    """uint8 [frame_px, frame_px, 3]."""
    dropped: int = 0
    """Total number of frames that were skipped before this one."""


def is_live(source: str) -> bool:
    """Whether a source is live (a camera or an address), and does not wait for its reader."""
    return "://" in source or source.startswith(CAMERA)


def live_frames(source: str, *, fps: float, frame_px: int, pace: bool = True) -> Iterator[LiveFrame]:
    """Yield `fps` frames per second of a source. With `pace`, a file is read at the video's own speed, otherwise as fast as possible.

    Raises UserError if the source cannot be opened, or fails before its first frame.
    """
    frames = _read(source, fps, frame_px)
    if is_live(source):
        yield from _newest(frames)
        return
    started = time.monotonic()
    for frame in frames:
        if pace and (early := frame.time_s - (time.monotonic() - started)) > 0:
            time.sleep(early)
        yield frame


def _read(source: str, fps: float, frame_px: int) -> Iterator[LiveFrame]:
    """Yield the picture that is shown at each sampling time: the last one that started no later."""
    options: dict[str, Any] = {"format": "v4l2"} if source.startswith(CAMERA) else {"timeout": TIMEOUT_S} if "://" in source else {}
    if not is_live(source) and not Path(source).is_file():
        raise UserError("there is no such file", where=source, fix="give a video's path, a camera (/dev/video0) or an address")
    found = 0
    try:
        with av.open(source, "r", metadata_errors="replace", **options) as container:
            if not container.streams.video:
                raise UserError("there is no video in it", where=source, fix="give a video's path, a camera (/dev/video0) or an address")
            stream = container.streams.video[0]
            aspect = _pixel_aspect(stream)
            origin: float | None = None
            shown, end_s = None, 0.0
            for picture in container.decode(stream):
                if picture.time is None:
                    continue
                origin = picture.time if origin is None else origin
                start_s = picture.time - origin
                while shown is not None and found / fps < start_s - START_TOLERANCE_S:
                    yield LiveFrame(found / fps, _square(shown, frame_px, aspect))
                    found += 1
                shown = picture
                end_s = max(end_s, start_s + float((picture.duration or 0) * (picture.time_base or 0)))
            while shown is not None and (not found or found / fps < end_s - START_TOLERANCE_S):
                yield LiveFrame(found / fps, _square(shown, frame_px, aspect))
                found += 1
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if found:  # end the stream: questions about the frames so far can still be asked
            return
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the source cannot be read: {reason}", where=source, fix="check that a player plays it") from error
    if not found:
        raise UserError("no frame could be decoded", where=source, fix="check that a player plays it")


def _newest(frames: Iterator[LiveFrame]) -> Iterator[LiveFrame]:
    """Read the frames in a background thread; yields the newest of those that have arrived."""
    waiting: queue.Queue[LiveFrame | BaseException | None] = queue.Queue(maxsize=1)
    dropped, ended = 0, threading.Event()

    def put(item: LiveFrame | BaseException | None) -> None:
        nonlocal dropped
        while not ended.is_set():
            try:
                waiting.put_nowait(item)
                return
            except queue.Full:
                if not isinstance(item, LiveFrame):  # the end must not replace the last frame
                    time.sleep(0.01)
                    continue
                try:
                    waiting.get_nowait()
                    dropped += 1
                except queue.Empty:
                    pass

    def read() -> None:
        try:
            for frame in frames:
                put(frame)
            put(None)
        except BaseException as error:  # raised again by the consumer, which would wait for ever otherwise
            put(error)

    threading.Thread(target=read, name="source", daemon=True).start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield LiveFrame(item.time_s, item.pixels, dropped)
    finally:
        ended.set()
