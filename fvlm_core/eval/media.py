"""Media of benchmark items: a video, a folder of frames, images, or frames in memory; decoded only when needed.

Frames of videos are extracted as in training (`fvlm_core.data.frames`): one per second, at most 64, the short side resized, then
center-cropped. Images are resized and cropped in the same way and shown several times, as in training.
"""

import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from fvlm_core.data.frames import ClipError, FrameRule, extract_frames
from fvlm_core.eval.stills import as_shown, square

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm", ".avi", ".mov", ".gif")
ANNOTATED_FPS = 3.0
"""Frame rate of a folder of frames if the benchmark does not give one (MVBench's TVQA clips)."""


T = TypeVar("T")


@dataclass(frozen=True)
class Media:
    """Decoded frames, and the order in which they are shown."""

    frames: np.ndarray
    """uint8 [F, H, W, 3]: the distinct frames."""
    shown: list[list[int]]
    """Per video or image, indices into `frames` in the order shown."""
    images: bool = False
    """Whether they are known to be images. False: videos, or an image where one frame is shown several times."""
    duration_s: float | None = None
    """Length of the video, or of its part; None if there is not exactly one video or its length is not known."""

    @property
    def n_shown(self) -> int:
        """Number of shown frames."""
        return sum(map(len, self.shown))

    @property
    def key(self) -> str:
        """Hash of the frames and their order."""
        return blake2b(self.frames.tobytes() + repr(self.shown).encode(), digest_size=12).hexdigest()

    def shuffled(self, seed: int, name: str) -> "Media":
        """A copy with the frames of each video in another order; a video with a single distinct frame is unchanged."""
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return replace(self, shown=[_other_order(indexes, rng) for indexes in self.shown])

    def load(self, rule: FrameRule, image_repeats: int) -> "Media":
        """The media, with frames resized to `rule.frame_px`."""
        if not len(self.frames) or self.frames.shape[1:3] == (rule.frame_px, rule.frame_px):
            return self
        return replace(self, frames=np.stack([square(Image.fromarray(frame), rule.frame_px) for frame in self.frames]))


NO_MEDIA = Media(np.zeros((0, 1, 1, 3), np.uint8), [])
"""For text-only items and the blind baseline."""


class Source(Protocol):
    """Media that can be decoded."""

    @property
    def key(self) -> str:
        """Identifies the media: items with the same key share the encoding and form one resampling unit."""
        ...

    def load(self, rule: FrameRule, image_repeats: int) -> Media:
        """Decode the media. Raises ClipError with a user-readable reason."""
        ...


def relative_key(root: Path, path: Path) -> str:
    """The path relative to a benchmark's folder: unique within the benchmark, and the same on every machine.

    A path outside `root` is returned unchanged.
    """
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


@dataclass(frozen=True)
class VideoFile:
    """A video, or its part between two times."""

    path: Path
    start_s: float | None = None
    end_s: float | None = None
    root: Path = field(default=Path(), compare=False)
    """The benchmark's folder; the key is the path relative to it."""

    @property
    def key(self) -> str:
        part = "" if self.start_s is None and self.end_s is None else f"[{self.start_s}-{self.end_s}]"
        return f"{relative_key(self.root, self.path)}{part}"

    def load(self, rule: FrameRule, image_repeats: int) -> Media:
        """Decode the file. Raises ClipError if it is not an intact video."""
        part = _Part(rule.frame_px, rule.fps, rule.max_frames, rule.square_pixels, self.start_s or 0.0, self.end_s)
        found = extract_frames(_content(self.path), part)
        duration_s = part.end_s_of(found.duration_s) - part.start_s
        return Media(found.pixels, [list(range(len(found.pixels)))], duration_s=duration_s)


@dataclass(frozen=True)
class FrameFolder:
    """A video stored as a folder of images, ordered by name."""

    path: Path
    fps: float = ANNOTATED_FPS
    start_s: float | None = None
    end_s: float | None = None
    root: Path = field(default=Path(), compare=False)
    """The benchmark's folder; the key is the path relative to it."""

    @property
    def key(self) -> str:
        return f"{relative_key(self.root, self.path)}[{self.start_s}-{self.end_s}]"

    def load(self, rule: FrameRule, image_repeats: int) -> Media:
        """Decode the images at the rule's times. Raises ClipError if there are none."""
        files = sorted(file for file in self.path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        first, last = (int((time or 0) * self.fps) for time in (self.start_s, self.end_s))
        files = files[first : last or None]
        if not files:
            raise ClipError("the folder has no frames")
        frames = np.stack([_picture(_content(files[index]), rule.frame_px) for index in rule.indices(len(files), self.fps)])
        return Media(frames, [list(range(len(frames)))], duration_s=len(files) / self.fps)


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
    """The benchmark's identifier of the images, if it has one; by default, the key is made from the files' paths."""
    root: Path = field(default=Path(), compare=False)
    """The benchmark's folder; the key uses paths relative to it."""

    @property
    def key(self) -> str:
        if self.name:
            return self.name
        return blake2b(b"\0".join(map(self._identity, self.images)), digest_size=12).hexdigest()

    def load(self, rule: FrameRule, image_repeats: int) -> Media:
        """Decode every image; each is shown `image_repeats` times. Raises ClipError if one cannot be decoded."""
        frames = np.stack([_picture(content, rule.frame_px) for content in self._contents()])
        return Media(frames, [[index] * image_repeats for index in range(len(frames))], images=True)

    def whole(self) -> list[Image.Image]:
        """Decode every image in its own size, upright and RGB. Raises ClipError if one cannot be decoded."""
        return [_decoded(content, lambda image: image) for content in self._contents()]

    def _contents(self) -> list[bytes]:
        return [image if isinstance(image, bytes) else _content(image) for image in self.images]

    def _identity(self, image: "bytes | Picture") -> bytes:
        if isinstance(image, bytes):
            return image
        return (relative_key(self.root, image) if isinstance(image, Path) else image.name).encode()


@dataclass(frozen=True)
class Rendered:
    """Frames that are generated when needed."""

    key: str
    make: Callable[[int], np.ndarray]
    """Maps the side in pixels to frames, uint8 [T, side, side, 3]."""
    image: bool = False

    def load(self, rule: FrameRule, image_repeats: int) -> Media:
        """Generate the frames."""
        frames = self.make(rule.frame_px)
        shown = [[index] * image_repeats for index in range(len(frames))] if self.image else [list(range(len(frames)))]
        return Media(frames, shown, images=self.image)


@dataclass(frozen=True)
class _Part(FrameRule):
    """The frame rule for a part of a video."""

    start_s: float = 0.0
    end_s: float | None = None

    def times_s(self, duration_s: float) -> list[float]:
        """Frame times in the part from `start_s` to `end_s`, as if it were a video of its own."""
        end_s = self.end_s_of(duration_s)
        if self.start_s >= end_s:
            raise ClipError(f"the part from {self.start_s:g} to {end_s:g} s is empty")
        return [self.start_s + time for time in super().times_s(end_s - self.start_s)]

    def end_s_of(self, duration_s: float) -> float:
        """The end of the part of a video of this length."""
        return min(duration_s, self.end_s or duration_s)


def _content(path: "Picture") -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ClipError(f"the file cannot be read: {error.strerror}") from error


def _picture(content: bytes, side: int) -> np.ndarray:
    return _decoded(content, lambda image: square(image, side))


def _decoded(content: bytes, use: Callable[[Image.Image], T]) -> T:
    """Apply `use` to a decoded image, upright and RGB. Raises ClipError if the image cannot be decoded."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return use(as_shown(image))
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise ClipError(f"not a readable image: {error}") from error


def _other_order(indexes: Sequence[int], rng: np.random.Generator) -> list[int]:
    if len(set(indexes)) < 2:
        return list(indexes)
    while True:
        order = [indexes[i] for i in rng.permutation(len(indexes))]
        if order != list(indexes):
            return order
