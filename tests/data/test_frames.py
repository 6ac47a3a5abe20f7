import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fvlm_core.data import gaze
from fvlm_core.data.clips import encode_mp4
from fvlm_core.data.frames import ClipError, FrameRule, encode_jpeg, extract_frames


@given(st.floats(0.01, 5000, allow_nan=False), st.integers(1, 64))
def test_rule(duration, most):
    times = FrameRule(42, max_frames=most).times_s(duration)
    assert len(times) == min(max(int(duration + 1e-3), 1), most)
    assert times[0] == 0
    assert all(0 <= time < max(duration, 0.02) + 2e-3 for time in times)
    if duration < most:
        assert times == list(range(len(times)))
    else:
        assert np.allclose(np.diff(times), duration / most if duration >= most + 1 else 1)


def grey(levels, side=64):
    """Frames of one grey each."""
    return np.repeat(np.array(levels, np.uint8), side * side * 3).reshape(-1, side, side, 3)


def levels_of(content, **rule):
    return [round(float(frame.mean())) for frame in extract_frames(content, FrameRule(32, **rule)).pixels]


def test_one_frame_per_second():
    levels = [10, 60, 110, 160, 210]
    assert levels_of(encode_mp4(grey(levels))) == pytest.approx(levels, abs=3)


def test_more_than_the_maximum_gives_evenly_spaced_frames():
    levels = list(range(20, 180, 2))  # 80 s
    found = levels_of(encode_mp4(grey(levels)))
    assert len(found) == 64
    assert found == pytest.approx([levels[int(index * 80 / 64)] for index in range(64)], abs=3)


def test_half_and_double_rate():
    content = encode_mp4(grey([20, 60, 100, 140]))
    assert levels_of(content, fps=0.5) == pytest.approx([20, 100], abs=3)
    assert levels_of(content, fps=2) == pytest.approx([20, 20, 60, 60, 100, 100, 140, 140], abs=3)


@pytest.mark.parametrize("shape", [(96, 54), (54, 96), (64, 64)], ids=["portrait", "landscape", "square"])
def test_short_side_is_scaled_and_the_centre_kept(shape):
    """Against Pillow's area average of the same centre."""
    height, width = shape
    rng = np.random.default_rng(0)
    small = rng.integers(30, 220, (height // 6, width // 6), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(small).convert("RGB").resize((width * 2, height * 2), Image.Resampling.BICUBIC))
    found = extract_frames(encode_mp4(picture[None]), FrameRule(27)).pixels[0]
    scale = 27 / min(shape)
    size = (max(27, round(width * scale)), max(27, round(height * scale)))
    reference = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX)).astype(int)
    top, left = (size[1] - 27) // 2, (size[0] - 27) // 2
    difference = np.abs(found - reference[top : top + 27, left : left + 27])
    assert difference.mean() < 4
    shifted = np.abs(found - np.roll(reference, 3, (0, 1))[top : top + 27, left : left + 27])
    assert shifted.mean() > 2 * difference.mean()


@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2), Fraction(4, 3)], ids=str)
def test_anamorphic_video_is_shown_in_its_true_proportions(tmp_path, aspect):
    """A video that is stored squeezed gives the frames of the same picture stored as it is to be seen."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(30, 220, (6, 10), dtype=np.uint8)).convert("RGB")
    stored = 180, 120
    picture = np.asarray(small.resize(stored, Image.Resampling.BICUBIC))
    shown = np.asarray(Image.fromarray(picture).resize((round(stored[0] * aspect / 2) * 2, stored[1]), Image.Resampling.BICUBIC))
    squeezed = encode(tmp_path / "squeezed.mp4", picture[None], 2, aspect=aspect)
    plain = encode(tmp_path / "plain.mp4", shown[None], 2)
    found, reference = (extract_frames(content, FrameRule(48)).pixels[0].astype(int) for content in (squeezed, plain))
    ignored = extract_frames(squeezed, FrameRule(48, square_pixels=False)).pixels[0]
    assert np.abs(found - reference).mean() < 4
    assert np.abs(ignored - reference).mean() > 2 * np.abs(found - reference).mean()


def test_clip_comes_back_as_it_was_drawn():
    clip = gaze.render(np.random.default_rng(0), "train", frames=4, scale=3, noise=0)
    found = extract_frames(encode_mp4(clip.frames), FrameRule(42))
    assert found.duration_s == pytest.approx(4)
    drawn = clip.frames.reshape(4, 42, 3, 42, 3, 3).mean((2, 4))
    assert np.abs(found.pixels - drawn).mean() < 8


def encode(path: Path, frames: np.ndarray, fps: int, *, aspect: Fraction = Fraction(1), **options: str) -> bytes:
    """A video file of any container, a frame each 1/fps s; `aspect` of its pixels."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def test_b_frames_and_a_container_without_stream_duration(tmp_path):
    levels = [20 + 8 * (index // 10) for index in range(75)]
    content = encode(tmp_path / "clip.mkv", grey(levels), 10)
    assert levels_of(content) == pytest.approx([20, 28, 36, 44, 52, 60, 68], abs=3)


def test_truncated_file_is_an_error_not_a_shorter_clip(tmp_path):
    rng = np.random.default_rng(0)
    content = encode(tmp_path / "clip.mp4", rng.integers(0, 255, (80, 64, 64, 3), dtype=np.uint8), 10, movflags="faststart")
    assert len(extract_frames(content, FrameRule(32)).pixels) == 8
    with pytest.raises(ClipError, match=r"breaks off|damaged|not a readable"):
        extract_frames(content[: len(content) // 2], FrameRule(32))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>not found</html>", "web page"),
        (np.random.default_rng(0).bytes(5000), "not a readable video"),
        (encode_mp4(grey([10, 20]))[:600], "not a readable video"),
    ],
    ids=["empty", "html", "noise", "cut"],
)
def test_what_is_not_a_video(content, reason):
    with pytest.raises(ClipError, match=reason):
        extract_frames(content, FrameRule(42))


def test_metadata_in_another_encoding_does_no_harm():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", metadata_encoding="latin-1") as container:
        container.metadata["title"] = "Été"
        stream = container.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(grey([100])[0], format="rgb24")))
        container.mux(stream.encode())
    assert levels_of(buffer.getvalue()) == pytest.approx([100], abs=3)


def test_sound_alone_is_not_a_video():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(ClipError, match="no video stream"):
        extract_frames(buffer.getvalue(), FrameRule(42))


def test_jpegs_are_decoded_as_pillow_does():
    frame = gaze.render(np.random.default_rng(1), "train", frames=1).frames[0]
    jpeg = encode_jpeg(frame)
    ours = simplejpeg.decode_jpeg(jpeg, "RGB")
    assert (ours == np.asarray(Image.open(io.BytesIO(jpeg)))).all()
    assert np.abs(ours.astype(int) - frame).mean() < 16
