"""Every codec, container and oddity that a published clip may have: the frames of its seconds, the same as if all were decoded."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
import pytest

from fvlm_core.data import frames as frames_module
from fvlm_core.data.frames import ClipError, FrameRule, decode_in_order, extract_frames

FPS = 10
LEVELS = [30, 70, 110, 150, 190, 230]
"""Grey of each second."""
CODECS = {
    "h264": ("libx264", {"preset": "veryfast", "g": "25", "bf": "3"}),
    "h264-open-gop": ("libx264", {"preset": "veryfast", "g": "15", "bf": "3", "x264-params": "open-gop=1"}),
    "hevc": ("libx265", {"preset": "ultrafast", "x265-params": "keyint=20:bframes=3:log-level=none"}),
    "vp8": ("libvpx", {"deadline": "realtime", "g": "20", "auto-alt-ref": "1", "lag-in-frames": "8"}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "20", "lag-in-frames": "8"}),
    "av1": ("libsvtav1", {"preset": "12", "g": "20"}),
    "mpeg4": ("mpeg4", {"g": "12", "bf": "2"}),
    "mjpeg": ("mjpeg", {}),
}
CONTAINERS = {
    "h264": ("mp4", "matroska", "mpegts", "mov"),
    "h264-open-gop": ("mp4", "matroska"),
    "hevc": ("mp4", "matroska"),
    "vp8": ("webm",),
    "vp9": ("webm", "mp4"),
    "av1": ("webm", "mp4"),
    "mpeg4": ("mp4", "avi"),
    "mjpeg": ("avi", "matroska"),
}


def pictures(levels: list[int], *, per_level: int = FPS, size: tuple[int, int] = (64, 96)) -> list[np.ndarray]:
    """Pictures of one grey each, with a moving corner so that nothing is a plain copy."""
    made = []
    for number in range(len(levels) * per_level):
        picture = np.full((*size, 3), levels[number // per_level], np.uint8)
        picture[:8, (number * 3) % (size[1] - 8) :][:, :8] = 255 - picture[0, 0, 0]
        made.append(picture)
    return made


@contextmanager
def scheduling_kept() -> Iterator[None]:
    """SVT-AV1 makes the thread that encodes as root real-time and leaves it so: what it starts later would starve the machine."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def encode(
    codec: str,
    container: str,
    made: list[np.ndarray],
    *,
    pts: Callable[[int], int] = lambda number: number,
    unit: Fraction = Fraction(1, FPS),
    prepare: Callable[[av.container.OutputContainer, av.VideoStream], None] = lambda output, stream: None,
) -> bytes:
    """A video of pictures; `pts` in `unit` seconds."""
    name, options = CODECS[codec]
    if name not in av.codecs_available:
        pytest.skip(f"this PyAV has no {name}")
    buffer = io.BytesIO()
    with scheduling_kept(), av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(name, rate=FPS, options=options)
        stream.height, stream.width = made[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.thread_count = 1
        prepare(output, stream)
        for number, picture in enumerate(made):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = pts(number), unit
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def levels_of(content: bytes, rule: FrameRule) -> list[float]:
    """Grey of each frame; checked to be those of a decoder that leaves nothing out."""
    found, reference = extract_frames(content, rule), decode_in_order(content, rule)
    assert found.duration_s == reference.duration_s
    assert (found.pixels == reference.pixels).all()
    return [float(np.median(frame)) for frame in found.pixels]


@pytest.mark.parametrize(("codec", "container"), [(codec, container) for codec, all_of in CONTAINERS.items() for container in all_of])
def test_codec_in_container(codec: str, container: str) -> None:
    content = encode(codec, container, pictures(LEVELS))
    assert levels_of(content, FrameRule(32)) == pytest.approx(LEVELS, abs=6)
    assert levels_of(content, FrameRule(32, max_frames=3)) == pytest.approx(LEVELS[::2], abs=6)


def test_only_what_is_needed_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long film, a few of its pictures; and no second look at it."""
    content = encode("h264", "mp4", pictures([40, 80, 120, 160] * 10))
    counted = 0
    decoded = frames_module._decoded

    def counting(*given):
        nonlocal counted
        for frame in decoded(*given):
            counted += 1
            yield frame

    monkeypatch.setattr(frames_module, "_decoded", counting)
    monkeypatch.setattr(frames_module, "_in_order", None)
    assert len(extract_frames(content, FrameRule(32, max_frames=4)).pixels) == 4
    assert counted < 4 * 25 < 400


def test_variable_frame_rate() -> None:
    """A slide show: pictures stay for 3, 1, 1 and 3 s."""
    stays = [0, 30, 40, 50, 79]
    content = encode("h264", "mp4", pictures([40, 90, 140, 190, 190], per_level=1), pts=lambda number: stays[number])
    assert levels_of(content, FrameRule(32))[:8] == pytest.approx([40, 40, 40, 90, 140, 190, 190, 190], abs=6)


def test_rotated_video_is_upright() -> None:
    """A phone's clip: stored on its side, with a display matrix."""
    lying = np.full((64, 96, 3), 40, np.uint8)
    lying[:, 48:] = 200  # bright on the right as it is stored
    content = bytearray(encode("h264", "mp4", [lying] * FPS))
    identity = b"".join(value.to_bytes(4, "big", signed=True) for value in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    quarter = b"".join(value.to_bytes(4, "big", signed=True) for value in (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30))
    track = content.index(identity, content.index(b"tkhd"))
    content[track : track + len(quarter)] = quarter
    [frame] = extract_frames(bytes(content), FrameRule(32)).pixels
    top, bottom = float(frame[:12].mean()), float(frame[-12:].mean())
    assert (top, bottom) == pytest.approx((40, 200), abs=8), "turned by a quarter, clockwise"


def test_several_streams() -> None:
    """Sound and a second video beside the first: the first video's frames."""

    def more(output: av.container.OutputContainer, stream: av.VideoStream) -> None:
        sound = output.add_stream("aac", rate=8000)
        second = output.add_stream("libx264", rate=FPS)
        second.width, second.height, second.pix_fmt = 64, 64, "yuv420p"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 8000, 0
        output.mux(sound.encode(silence))
        for _ in range(FPS):
            output.mux(second.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 5, np.uint8), format="rgb24")))
        output.mux(second.encode())

    content = encode("h264", "matroska", pictures(LEVELS[:3]), prepare=more)
    assert levels_of(content, FrameRule(32, max_frames=3))[:3] == pytest.approx(LEVELS[:3], abs=6)


@pytest.mark.parametrize("size", [(8, 8), (96, 54), (54, 96), (2, 200)], ids=str)
def test_tiny_and_portrait(size: tuple[int, int]) -> None:
    content = encode("h264", "mp4", [np.full((*size, 3), 90, np.uint8)] * FPS)
    assert levels_of(content, FrameRule(224)) == pytest.approx([90], abs=6)
    assert extract_frames(content, FrameRule(224)).pixels.shape == (1, 224, 224, 3)


def test_a_broken_end_is_an_error() -> None:
    content = encode("h264", "matroska", pictures(LEVELS))
    with pytest.raises(ClipError):
        extract_frames(content[: len(content) // 2] + bytes(len(content) // 2), FrameRule(32))


def late(codec: str, container: str, start_s: float, *, sound: bool = False) -> bytes:
    """A video of 6 s whose first picture has the timestamp `start_s`; its sound begins at 0."""
    unit = Fraction(1, 1000)

    def prepare(output: av.container.OutputContainer, stream: av.VideoStream) -> None:
        stream.time_base = stream.codec_context.time_base = unit
        if not sound:
            return
        voice = output.add_stream("aac" if container in ("mp4", "mpegts") else "libopus", rate=48000)
        voice.codec_context.layout = "mono"
        samples = np.zeros((1, 960), np.float32 if voice.codec.name == "aac" else np.int16)
        for number in range(round((start_s + len(LEVELS)) * 50)):
            silence = av.AudioFrame.from_ndarray(samples, format="fltp" if voice.codec.name == "aac" else "s16", layout="mono")
            silence.sample_rate, silence.pts, silence.time_base = 48000, number * 960, Fraction(1, 48000)
            output.mux(voice.encode(silence))
        output.mux(voice.encode())

    return encode(codec, container, pictures(LEVELS), pts=lambda n: round(1000 * (start_s + n / FPS)), unit=unit, prepare=prepare)


@pytest.mark.parametrize("sound", [False, True], ids=["silent", "with sound"])
@pytest.mark.parametrize("start_s", [0, 1.48, 5])
@pytest.mark.parametrize(
    ("codec", "container"), [("h264", "mp4"), ("h264", "mpegts"), ("h264", "matroska"), ("vp9", "webm"), ("vp9", "matroska")]
)
def test_a_video_may_begin_after_the_time_0(codec: str, container: str, start_s: float, sound: bool) -> None:
    """A clip cut out with its timestamps kept, or a video that sets in after its sound. Matroska states the end, not the length."""
    content = late(codec, container, start_s, sound=sound)
    assert levels_of(content, FrameRule(32)) == pytest.approx(LEVELS, abs=6)
    assert extract_frames(content, FrameRule(32)).duration_s == pytest.approx(len(LEVELS), abs=0.06)


def test_mkvmerge_states_the_length_of_a_late_video() -> None:
    content = late("h264", "matroska", 5)
    assert content.count(b"00:00:11.000000000") == 1, "FFmpeg's tag is the end"
    content = content.replace(b"00:00:11.000000000", b"00:00:06.000000000")
    assert levels_of(content, FrameRule(32)) == pytest.approx(LEVELS, abs=6)


@pytest.mark.parametrize("start_s", [0, 1.48, 5])
def test_a_late_video_that_breaks_off_is_an_error(start_s: float) -> None:
    content = late("h264", "matroska", start_s)
    with pytest.raises(ClipError, match=r"breaks off|damaged"):
        extract_frames(content[: len(content) // 2], FrameRule(32))
