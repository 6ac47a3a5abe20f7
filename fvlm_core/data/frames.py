"""From the bytes of a video to its frames: one per second, square, as JPEG. All code that reads video uses this module.

The frames are those shown at t = 0, 1, 2, ... s (for 1 FPS): `floor(duration)` of them, but at least one and at most `max_frames`; a
longer video gives `max_frames` evenly spaced ones. The short side is scaled to `frame_px`, and the centre is cropped. The packets'
timestamps tell in advance which pictures these are, so pictures that are neither shown nor needed to decode shown ones (`_needed`) are
skipped. If this does not give every picture intact, all pictures are decoded in order. An image is a video of one frame, and a tar of
images is a video with a frame per image. Needs only PyAV, NumPy and simplejpeg, because video2dataset's environment imports it too.
"""

import io
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, Protocol, TypeVar

import av
import av.error
import numpy as np
import simplejpeg
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

JPEG_QUALITY = 90
TIME_TOLERANCE_S = 1e-3
"""Durations and timestamps are rounded to their time base; 2.9999 s counts as 3 s."""
START_TOLERANCE_S = 5e-4
"""A picture that starts at most this long after a point in time counts as shown at it, because Matroska rounds to milliseconds. At 29.97
frames per second, the picture that starts at 1.001 s is not the one shown at 1 s."""
MATROSKA = "matroska,webm"
TIMED_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", MATROSKA)
"""Containers whose packets have presentation timestamps; others have decoding timestamps, or none."""
DURATION_TAG = re.compile(r"(\d+):(\d+):(\d+\.?\d*)")
TAR_MARK, TAR_MARK_OFFSET = b"ustar", 257
HTML_MARKS = (b"<!doctype", b"<html", b"<head", b"<?xml")


class ClipError(Exception):
    """A clip gives no frames. The message tells the clip's owner why."""


@dataclass(frozen=True)
class FrameRule:
    """Which frames to take from a video, and how large."""

    frame_px: int
    fps: float = 1.0
    max_frames: int = 64
    square_pixels: bool = True
    """Correct for the non-square pixels of anamorphic video."""

    def times_s(self, duration_s: float) -> list[float]:
        """Return when the chosen frames of a video of this length are shown, in seconds from its start."""
        wanted = int((duration_s + TIME_TOLERANCE_S) * self.fps)
        if wanted > self.max_frames:
            return [index * duration_s / self.max_frames for index in range(self.max_frames)]
        return [index / self.fps for index in range(max(wanted, 1))]

    def indices(self, count: int, fps: float) -> list[int]:
        """Return the indices of the chosen frames among `count` pictures that are 1 / `fps` s apart, as in a video file of them."""
        return [min(count - 1, int((time_s + START_TOLERANCE_S) * fps)) for time_s in self.times_s(count / fps)]


@dataclass(frozen=True)
class Frames:
    """The chosen frames of a video."""

    pixels: np.ndarray
    """uint8 [T, frame_px, frame_px, 3], RGB."""
    duration_s: float


Window = tuple[float, float]
"""Start and end, in seconds, of the part of a video to use."""


def extract_frames(content: bytes, rule: FrameRule, window: Window | None = None) -> Frames:
    """Decode the chosen frames of a video file, or of its part in `window`. A tar holds images of one frame each.

    Raises ClipError if there is no video, or if it is incomplete.
    """
    if not content:
        raise ClipError("the file is empty")
    if content[:256].lstrip().lower().startswith(HTML_MARKS):
        raise ClipError("a web page, not a video")
    if content[TAR_MARK_OFFSET : TAR_MARK_OFFSET + len(TAR_MARK)] == TAR_MARK:
        return _extract_images(content, rule)
    try:
        try:
            return _extract(content, rule, _selected, window)
        except (_UnsureError, av.error.FFmpegError):
            return _extract(content, rule, _in_order, window)
    except av.error.FFmpegError as error:
        raise ClipError(f"not a readable video: {error.strerror}") from error


def decode_in_order(content: bytes, rule: FrameRule, window: Window | None = None) -> Frames:
    """Like `extract_frames` for a video, but decodes every picture up to the last one shown. The reference for tests."""
    return _extract(content, rule, _in_order, window)


def _extract_images(content: bytes, rule: FrameRule) -> Frames:
    """Return the first frame of every file in a tar."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        files = [archive.extractfile(member) for member in archive]
    if len(files) > rule.max_frames:
        raise ClipError(f"{len(files)} images in one sample; at most {rule.max_frames} are allowed")
    images = [extract_frames(file.read() if file else b"", rule) for file in files]
    return Frames(np.concatenate([image.pixels[:1] for image in images]), sum(image.duration_s for image in images))


def encode_jpeg(frame: np.ndarray) -> bytes:
    """Encode a frame, uint8 [H, W, 3], as JPEG (quality 90, 4:2:0)."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="420")


class _UnsureError(Exception):
    """The decoded pictures are not those that the packets announced."""


class _Packet(NamedTuple):
    """What a packet says about its picture."""

    pts: int | None
    duration: int
    is_key: bool
    is_shown: bool
    """False for pictures that a container's edit list cuts off."""


class _Picture(Protocol):
    """A decoded picture, or the packet that contains it."""

    @property
    def pts(self) -> int | None: ...
    @property
    def duration(self) -> int | None: ...


P = TypeVar("P", bound=_Picture)


Choose = Callable[[InputContainer, VideoStream, list[_Packet], list[float]], Iterator[VideoFrame]]


def _extract(content: bytes, rule: FrameRule, choose: Choose, window: Window | None) -> Frames:
    with av.open(io.BytesIO(content), "r", metadata_errors="replace") as container:
        stream = _video_stream(container)
        packets = [_of(packet) for packet in container.demux(stream) if packet.size]
        duration_s, aspect = _duration_s(container, stream, packets), _pixel_aspect(stream) if rule.square_pixels else 1.0
        start_s = 0.0
        if window is not None:
            start_s, end_s = window[0], min(window[1], duration_s)
            if start_s >= end_s:
                raise ClipError(f"the seconds {window[0]:g} to {window[1]:g} are not in a video of {duration_s:.1f} s")
            duration_s = end_s - start_s
        container.seek(0)
        times_s = [start_s + time_s for time_s in rule.times_s(duration_s)]
        shown = [_square(frame, rule.frame_px, aspect) for frame in choose(container, stream, packets, times_s)]
        return Frames(np.stack(shown), duration_s)


def _video_stream(container: InputContainer) -> VideoStream:
    if not container.streams.video:
        raise ClipError("the file has no video stream")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # clips are decoded in parallel, not frames
    return stream


def _duration_s(container: InputContainer, stream: VideoStream, packets: list[_Packet]) -> float:
    """Length of the video stream: from the file's metadata or, if there is none, from the packets."""
    assert stream.time_base is not None
    is_matroska = container.format.name == MATROSKA
    if stream.duration and not is_matroska:  # Matroska's streams have none: FFmpeg copies the container's, which may be the sound's
        return float(stream.duration * stream.time_base)
    starts = [packet.pts for packet in packets if packet.pts is not None and packet.is_shown]
    ends = [packet.pts + packet.duration for packet in packets if packet.pts is not None]
    start_s = float(min(starts, default=0) * stream.time_base)
    packets_s = float(max(ends, default=0) * stream.time_base) - start_s
    stated_s = _stated_s(container, stream)
    if stated_s is not None and is_matroska and start_s > 0:
        # FFmpeg states when the video ends, counted from 0, and mkvmerge how long it lasts; the packets tell which
        return min(max(packets_s, stated_s - start_s), stated_s)
    if stated_s is not None:
        return stated_s
    if not ends:
        raise ClipError("the video stream is empty")
    return packets_s


def _stated_s(container: InputContainer, stream: VideoStream) -> float | None:
    """Seconds in Matroska's DURATION tag or, if the video is the only stream, the container's duration."""
    if tag := DURATION_TAG.fullmatch(stream.metadata.get("DURATION", "")):
        return sum(float(value) * unit for value, unit in zip(tag.groups(), (3600, 60, 1), strict=True))
    return container.duration / av.time_base if len(container.streams) == 1 and container.duration else None


def _in_order(container: InputContainer, stream: VideoStream, packets: list[_Packet], times_s: list[float]) -> Iterator[VideoFrame]:
    """Yield the frames shown at ascending times, decoding all pictures."""
    assert stream.time_base is not None
    for frame, time_s in _shown(container.decode(stream), stream.time_base, times_s):
        yield _intact(frame, time_s)


def _selected(container: InputContainer, stream: VideoStream, packets: list[_Packet], times_s: list[float]) -> Iterator[VideoFrame]:
    """Yield the same frames, skipping pictures that are not needed. Raises _UnsureError if one differs from its packet's metadata."""
    assert stream.time_base is not None
    if container.format.name not in TIMED_FORMATS or any(packet.pts is None for packet in packets):
        raise _UnsureError
    in_order = sorted((packet for packet in packets if packet.is_shown), key=lambda packet: packet.pts or 0)
    complete = 0 < stream.frames <= len(packets)
    chosen = [(packet.pts, time_s) for packet, time_s in _shown(in_order, stream.time_base, times_s, complete=complete)]
    waiting = list(reversed(chosen))
    for frame in _decoded(container, stream, packets, {pts for pts, _ in chosen}):
        while waiting and frame.pts == waiting[-1][0]:
            if frame.is_corrupt:
                raise _UnsureError
            waiting.pop()
            yield frame
    if waiting:
        raise _UnsureError


def _decoded(container: InputContainer, stream: VideoStream, packets: list[_Packet], wanted: set[int | None]) -> Iterator[VideoFrame]:
    """Yield the wanted pictures, and others decoded for them. Unwanted non-reference pictures are skipped: none depends on them."""
    codec, needed, last = stream.codec_context, _needed(packets, wanted), -1
    for number, packet in enumerate(packet for packet in container.demux(stream) if packet.size):
        if number >= len(packets) or packet.pts != packets[number].pts:
            raise _UnsureError
        if number not in needed:
            continue
        if number != last + 1:
            yield from codec.decode(None)
            codec.flush_buffers()
        codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield from codec.decode(packet)
        last = number
    yield from codec.decode(None)


def _needed(packets: list[_Packet], wanted: set[int | None]) -> set[int]:
    """Return the numbers of the packets to decode: for each wanted picture, from the key frame before it up to it."""
    needed: set[int] = set()
    keys: list[int] = []
    for number, packet in enumerate(packets):
        if packet.is_key:
            keys.append(number)
        if packet.pts in wanted:
            # pictures that follow a key frame in the file but are shown before it depend on the previous key frame
            start = next((key for key in reversed(keys) if (packets[key].pts or 0) <= (packet.pts or 0)), 0)
            needed.update(range(start, number + 1))
    return needed


def _of(packet: Packet) -> _Packet:
    return _Packet(packet.pts, packet.duration or 0, packet.is_keyframe, not packet.is_discard)


def _shown(pictures: Iterable[P], time_base: Fraction, times_s: list[float], *, complete: bool = False) -> Iterator[tuple[P, float]]:
    """Yield the picture shown at each of the ascending times: the last one that starts no later. `pictures` are in presentation order.

    Durations of pictures are only used for the end of the video: in a file with reordered pictures, they belong to other pictures.
    `complete`: no picture is missing, so the last one is shown until the end.
    """
    remaining = list(reversed(times_s))
    origin: int | None = None
    shown: P | None = None
    end_s = 0.0
    for picture in pictures:
        if picture.pts is None:
            continue
        origin = picture.pts if origin is None else origin
        start_s = float((picture.pts - origin) * time_base)
        while remaining and shown is not None and remaining[-1] < start_s - START_TOLERANCE_S:
            yield shown, remaining.pop()
        if not remaining:
            return
        shown, end_s = picture, max(end_s, start_s + float((picture.duration or 0) * time_base))
    if shown is None:
        raise ClipError("no frame could be decoded")
    while remaining:
        if not complete and remaining[-1] > end_s + TIME_TOLERANCE_S:
            raise ClipError(f"the video breaks off at {end_s:.1f} s")
        yield shown, remaining.pop()


def _intact(frame: VideoFrame, time_s: float) -> VideoFrame:
    if frame.is_corrupt:
        raise ClipError(f"the video is damaged at {time_s:.1f} s")
    return frame


def _pixel_aspect(stream: VideoStream) -> float:
    """Width of a stored pixel over its height; 1 if the file does not say."""
    aspect = stream.sample_aspect_ratio
    return float(aspect) if aspect else 1.0


def _square(frame: VideoFrame, side: int, aspect: float) -> np.ndarray:
    """Scale the short side to `side`, crop the centre and turn it upright: uint8 [side, side, 3]. `aspect`: of a stored pixel."""
    shown_width = frame.width * aspect
    scale = side / min(shown_width, frame.height)
    width, height = max(side, round(shown_width * scale)), max(side, round(frame.height * scale))
    pixels = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA").to_ndarray()
    top, left = (height - side) // 2, (width - side) // 2
    return np.rot90(pixels[top : top + side, left : left + side], k=round(frame.rotation / 90))
