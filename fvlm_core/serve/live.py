"""Frames of a source that has no end, or is not to be held in memory: a file, a camera or a stream's address, so many per second.

One picture is decoded at a time. Those of a file are the ones that `fvlm_core.data.frames` would choose without a limit, and one more where
the video ends between two moments: a stream knows no length, so a second that begins is shown. A source that does not wait (a camera, an
address) has a thread that reads on while a frame is looked at, and of frames that come meanwhile only the newest is kept.
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
"""For an address to answer, and for its next packet."""


@dataclass(frozen=True)
class LiveFrame:
    """One frame of a source."""

    time_s: float
    """Since the first."""
    pixels: np.ndarray
    """uint8 [frame_px, frame_px, 3]."""
    dropped: int = 0
    """Frames that came before it and were not looked at, in all."""


def is_live(source: str) -> bool:
    """Whether a source does not wait for who reads it."""
    return "://" in source or source.startswith(CAMERA)


def live_frames(source: str, *, fps: float, frame_px: int, pace: bool = True) -> Iterator[LiveFrame]:
    """`fps` frames per second of a source, as it goes on. `pace`: those of a file come at the video's own speed, not as fast as they can.

    Raises UserError for a source that cannot be opened, or breaks before its first frame.
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
    """At each moment the picture that is shown then: the last that started no later."""
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
        if found:  # what was seen can still be asked about
            return
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the source cannot be read: {reason}", where=source, fix="check that a player plays it") from error
    if not found:
        raise UserError("no frame could be decoded", where=source, fix="check that a player plays it")


def _newest(frames: Iterator[LiveFrame]) -> Iterator[LiveFrame]:
    """The frames of a thread that reads on by itself; the newest where several have come."""
    waiting: queue.Queue[LiveFrame | BaseException | None] = queue.Queue(maxsize=1)
    dropped, ended = 0, threading.Event()

    def put(item: LiveFrame | BaseException | None) -> None:
        nonlocal dropped
        while not ended.is_set():
            try:
                waiting.put_nowait(item)
                return
            except queue.Full:
                if not isinstance(item, LiveFrame):  # the end: after the last frame, not instead of it
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
        except UserError as error:
            put(error)

    threading.Thread(target=read, name="source", daemon=True).start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield LiveFrame(item.time_s, item.pixels, dropped)
    finally:
        ended.set()
