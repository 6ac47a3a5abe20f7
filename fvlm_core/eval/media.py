"""What an item shows: a video, a folder of frames, images, or frames at hand; decoded only when the item's turn comes.

Videos give frames as training does (`fvlm_core.data.frames`): one per second, at most 64, short side scaled and the centre cut out.
Images are scaled and cut alike and shown several times, as training shows them.
"""

import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from fvlm_core.data.frames import ClipError, FrameRule, extract_frames
from fvlm_core.eval.stills import as_shown

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm", ".avi", ".mov", ".gif")
ANNOTATED_FPS = 3.0
"""Frames per second of a folder of frames, where the benchmark does not say (MVBench's TVQA clips)."""


@dataclass(frozen=True)
class Media:
    """Decoded frames, and in which order they are shown."""

    frames: np.ndarray
    """uint8 [F, H, W, 3]: the distinct frames."""
    shown: list[list[int]]
    """Per video or image, the frames to show in order, as indexes into `frames`."""

    @property
    def n_shown(self) -> int:
        """Shown frames."""
        return sum(map(len, self.shown))

    @property
    def key(self) -> str:
        """Equal for equal frames in equal order."""
        return blake2b(self.frames.tobytes() + repr(self.shown).encode(), digest_size=12).hexdigest()

    def shuffled(self, seed: int, name: str) -> "Media":
        """The frames of each video in another order (a video whose frames are all equal, or alone, stays as it is)."""
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return Media(self.frames, [_other_order(indexes, rng) for indexes in self.shown])

    def load(self, rule: FrameRule, image_repeats: int) -> "Media":
        """Itself, in the size asked for."""
        if not len(self.frames) or self.frames.shape[1:3] == (rule.frame_px, rule.frame_px):
            return self
        return Media(np.stack([_square(Image.fromarray(frame), rule.frame_px) for frame in self.frames]), self.shown)


NO_MEDIA = Media(np.zeros((0, 1, 1, 3), np.uint8), [])
"""For text-only items and the blind baseline."""


class Source(Protocol):
    """Media that can be decoded."""

    @property
    def key(self) -> str:
        """Equal for items that show the same: they are encoded once, and are one unit of resampling."""
        ...

    def load(self, rule: FrameRule, image_repeats: int) -> Media:
        """Decode. Raises ClipError, in words for its owner."""
        ...


def place_below(root: Path, path: Path) -> str:
    """A file's place in a benchmark: unlike its name of this file only, and unlike its full path the same on every machine.

    A file that is not below `root` has its own path.
    """
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


@dataclass(frozen=True)
class VideoFile:
    """A video, or the part of it between two times."""

    path: Path
    start_s: float | None = None
    end_s: float | None = None
    root: Path = field(default=Path(), compare=False)
    """The benchmark's folder, below which the video is known by its place."""

    @property
    def key(self) -> str:
        part = "" if self.start_s is None and self.end_s is None else f"[{self.start_s}-{self.end_s}]"
        return f"{place_below(self.root, self.path)}{part}"

    def load(self, rule: FrameRule, image_repeats: int) -> Media:
        """Decode the file. Raises ClipError where it is no intact video."""
        part = _Part(rule.frame_px, rule.fps, rule.max_frames, rule.square_pixels, self.start_s or 0.0, self.end_s)
        frames = extract_frames(_content(self.path), part).pixels
        return Media(frames, [list(range(len(frames)))])


@dataclass(frozen=True)
class FrameFolder:
    """A video as a folder of pictures, in the order of their names."""

    path: Path
    fps: float = ANNOTATED_FPS
    start_s: float | None = None
    end_s: float | None = None
    root: Path = field(default=Path(), compare=False)
    """The benchmark's folder, below which the folder is known by its place."""

    @property
    def key(self) -> str:
        return f"{place_below(self.root, self.path)}[{self.start_s}-{self.end_s}]"

    def load(self, rule: FrameRule, image_repeats: int) -> Media:
        """Decode the pictures that are shown at the rule's times. Raises ClipError where there are none."""
        files = sorted(file for file in self.path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        first, last = (int((time or 0) * self.fps) for time in (self.start_s, self.end_s))
        files = files[first : last or None]
        if not files:
            raise ClipError("the folder has no frames")
        times = rule.times_s(len(files) / self.fps)
        chosen = [files[min(len(files) - 1, int(time * self.fps))] for time in times]
        frames = np.stack([_picture(_content(file), rule.frame_px) for file in chosen])
        return Media(frames, [list(range(len(frames)))])


class Picture(Protocol):
    """A file, or a place in one, that holds an image."""

    @property
    def name(self) -> str: ...
    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class Images:
    """One or more images, as bytes or as files."""

    images: tuple["bytes | Picture", ...]
    name: str = ""
    """Equal for equal images, where the benchmark says which are; by default their files' places."""
    root: Path = field(default=Path(), compare=False)
    """The benchmark's folder, below which the files are known by their place."""

    @property
    def key(self) -> str:
        if self.name:
            return self.name
        return blake2b(b"\0".join(map(self._identity, self.images)), digest_size=12).hexdigest()

    def load(self, rule: FrameRule, image_repeats: int) -> Media:
        """Decode every image; each is shown `image_repeats` times. Raises ClipError where one is no image."""
        contents = [image if isinstance(image, bytes) else _content(image) for image in self.images]
        frames = np.stack([_picture(content, rule.frame_px) for content in contents])
        return Media(frames, [[index] * image_repeats for index in range(len(frames))])

    def _identity(self, image: "bytes | Picture") -> bytes:
        if isinstance(image, bytes):
            return image
        return (place_below(self.root, image) if isinstance(image, Path) else image.name).encode()


@dataclass(frozen=True)
class Rendered:
    """Frames that are made when they are needed."""

    key: str
    make: Callable[[int], np.ndarray]
    """Side in pixels -> uint8 [T, side, side, 3]."""
    image: bool = False

    def load(self, rule: FrameRule, image_repeats: int) -> Media:
        """Make them."""
        frames = self.make(rule.frame_px)
        shown = [[index] * image_repeats for index in range(len(frames))] if self.image else [list(range(len(frames)))]
        return Media(frames, shown)


@dataclass(frozen=True)
class _Part(FrameRule):
    """The frames of a part of a video."""

    start_s: float = 0.0
    end_s: float | None = None

    def times_s(self, duration_s: float) -> list[float]:
        """As for a video that begins at `start_s` and ends at `end_s`."""
        end_s = min(duration_s, self.end_s or duration_s)
        if self.start_s >= end_s:
            raise ClipError(f"the part from {self.start_s:g} to {end_s:g} s is empty")
        return [self.start_s + time for time in super().times_s(end_s - self.start_s)]


def _content(path: "Picture") -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ClipError(f"the file cannot be read: {error.strerror}") from error


def _picture(content: bytes, side: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _square(as_shown(image), side)
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise ClipError(f"not a readable image: {error}") from error


def _square(image: Image.Image, side: int) -> np.ndarray:
    """Short side scaled to `side`, centre cut out: uint8 [side, side, 3], as `fvlm_core.data.frames` does for videos."""
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    scaled = image.resize((width, height), Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    return np.asarray(scaled.crop((left, top, left + side, top + side)))


def _other_order(indexes: Sequence[int], rng: np.random.Generator) -> list[int]:
    if len(set(indexes)) < 2:
        return list(indexes)
    while True:
        order = [indexes[i] for i in rng.permutation(len(indexes))]
        if order != list(indexes):
            return order
