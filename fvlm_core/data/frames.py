"""From the bytes of a video to its frames: one per second, square, as JPEG. Everything that reads video goes through here.

Frames are those shown at t = 0, 1, 2, ... s (for a rate of 1 FPS), `floor(duration)` of them but at least one and at most
`max_frames`; a longer video gives `max_frames` evenly spaced ones. The short side is scaled to `frame_px` and the
centre cut out. Decoding is sequential, which at 1 FPS is faster than seeking. An image is a video of one frame, and a tar of images one of
as many. Needs PyAV, NumPy and simplejpeg only, since video2dataset's environment imports it too.
"""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import av
import av.error
import numpy as np
import simplejpeg
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

JPEG_QUALITY = 90
TIME_TOLERANCE_S = 1e-3
"""Durations and time stamps are rounded to their time base; 2.9999 s counts as 3 s."""
TAR_MARK, TAR_MARK_OFFSET = b"ustar", 257
HTML_MARKS = (b"<!doctype", b"<html", b"<head", b"<?xml")


class ClipError(Exception):
    """Why a clip gives no frames, in words for its owner."""


@dataclass(frozen=True)
class FrameRule:
    """Which frames, and how large."""

    frame_px: int
    fps: float = 1.0
    max_frames: int = 64
    square_pixels: bool = True
    """Correct for pixels that are not square, as anamorphic video has them."""

    def times_s(self, duration_s: float) -> list[float]:
        """When the chosen frames of a video of that length are shown, in seconds from its start."""
        wanted = int((duration_s + TIME_TOLERANCE_S) * self.fps)
        if wanted > self.max_frames:
            return [index * duration_s / self.max_frames for index in range(self.max_frames)]
        return [index / self.fps for index in range(max(wanted, 1))]


@dataclass(frozen=True)
class Frames:
    """The chosen frames of a video."""

    pixels: np.ndarray
    """uint8 [T, frame_px, frame_px, 3], RGB."""
    duration_s: float


def extract_frames(content: bytes, rule: FrameRule, window: tuple[float, float] | None = None) -> Frames:
    """Decode the chosen frames of a video file, or of the seconds of it in `window` (start, end). A tar holds images of one frame each.

    Raises ClipError if there is no video, or not all of it.
    """
    if not content:
        raise ClipError("the file is empty")
    if content[:256].lstrip().lower().startswith(HTML_MARKS):
        raise ClipError("a web page, not a video")
    if content[TAR_MARK_OFFSET : TAR_MARK_OFFSET + len(TAR_MARK)] == TAR_MARK:
        return _extract_images(content, rule)
    try:
        with av.open(io.BytesIO(content), "r") as container:
            stream = _video_stream(container)
            duration_s, aspect = _duration_s(container, stream), _pixel_aspect(stream) if rule.square_pixels else 1.0
            if window is None:
                chosen = _frames_at(container, stream, rule.times_s(duration_s))
            else:
                start_s, end_s = window[0], min(window[1], duration_s)
                if start_s >= end_s:
                    raise ClipError(f"the seconds {window[0]:g} to {window[1]:g} are not in a video of {duration_s:.1f} s")
                duration_s = end_s - start_s
                chosen = _frames_from(container, stream, [start_s + time_s for time_s in rule.times_s(duration_s)])
            return Frames(np.stack([_square(frame, rule.frame_px, aspect) for frame in chosen]), duration_s)
    except av.error.FFmpegError as error:
        raise ClipError(f"not a readable video: {error.strerror}") from error


def _extract_images(content: bytes, rule: FrameRule) -> Frames:
    """The first frame of every file in a tar."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        files = [archive.extractfile(member) for member in archive]
    if len(files) > rule.max_frames:
        raise ClipError(f"{len(files)} images in one sample; {rule.max_frames} may be")
    images = [extract_frames(file.read() if file else b"", rule) for file in files]
    return Frames(np.concatenate([image.pixels[:1] for image in images]), sum(image.duration_s for image in images))


def encode_jpeg(frame: np.ndarray) -> bytes:
    """A frame, uint8 [H, W, 3], as JPEG (quality 90, 4:2:0)."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="420")


def _video_stream(container: InputContainer) -> VideoStream:
    if not container.streams.video:
        raise ClipError("the file has no video stream")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # clips are decoded in parallel, not frames
    return stream


def _duration_s(container: InputContainer, stream: VideoStream) -> float:
    """Length of the video stream; where the file does not say, the packets are counted."""
    assert stream.time_base is not None
    if stream.duration:
        return float(stream.duration * stream.time_base)
    ends = [packet.pts + (packet.duration or 0) for packet in container.demux(stream) if packet.pts is not None]
    if not ends:
        raise ClipError("the video stream is empty")
    container.seek(0)
    return float((max(ends) - (stream.start_time or 0)) * stream.time_base)


def _frames_from(container: InputContainer, stream: VideoStream, times_s: list[float]) -> Iterator[VideoFrame]:
    """As `_frames_at`, without decoding what lies before the last key frame ahead of the first time."""
    assert stream.time_base is not None
    origin = stream.start_time or 0
    container.seek(origin + int(times_s[0] / stream.time_base), stream=stream)
    return _frames_at(container, stream, times_s, origin)


def _frames_at(container: InputContainer, stream: VideoStream, times_s: list[float], origin: int | None = None) -> Iterator[VideoFrame]:
    """The frames shown at ascending times: each the last that starts no later. Times count from `origin`, or from the first frame."""
    assert stream.time_base is not None
    remaining = list(reversed(times_s))
    shown: VideoFrame | None = None
    end_s = 0.0
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        origin = frame.pts if origin is None else origin
        start_s = float((frame.pts - origin) * stream.time_base)
        while remaining and shown is not None and remaining[-1] < start_s - TIME_TOLERANCE_S:
            yield _intact(shown, remaining.pop())
        shown, end_s = frame, start_s + float((frame.duration or 0) * stream.time_base)
        while remaining and remaining[-1] < end_s - TIME_TOLERANCE_S:
            yield _intact(shown, remaining.pop())
        if not remaining:
            return
    if shown is None:
        raise ClipError("no frame could be decoded")
    while remaining:
        if remaining[-1] > end_s + TIME_TOLERANCE_S:
            raise ClipError(f"the video breaks off at {end_s:.1f} s")
        yield _intact(shown, remaining.pop())


def _intact(frame: VideoFrame, time_s: float) -> VideoFrame:
    if frame.is_corrupt:
        raise ClipError(f"the video is damaged at {time_s:.1f} s")
    return frame


def _pixel_aspect(stream: VideoStream) -> float:
    """Width of a stored pixel over its height; 1 where the file does not say."""
    aspect = stream.sample_aspect_ratio
    return float(aspect) if aspect else 1.0


def _square(frame: VideoFrame, side: int, aspect: float) -> np.ndarray:
    """Short side scaled to `side`, centre cut out, turned upright: uint8 [side, side, 3]. `aspect`: of a stored pixel."""
    shown_width = frame.width * aspect
    scale = side / min(shown_width, frame.height)
    width, height = max(side, round(shown_width * scale)), max(side, round(frame.height * scale))
    pixels = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA").to_ndarray()
    top, left = (height - side) // 2, (width - side) // 2
    return np.rot90(pixels[top : top + side, left : left + side], k=round(frame.rotation / 90))
