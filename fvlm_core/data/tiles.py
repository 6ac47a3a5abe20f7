"""Large frames stored as tiles, so that a part can be decoded without the rest: gaze before encode opens only a few squares of a frame.

A stored frame is a small JPEG of the whole frame, then one JPEG per tile, row by row, then a trailer with their sizes (`_END`). JPEG
readers ignore everything after the end of the first picture and see the small frame, so shards can contain it like any other frame. Tiles
are encoded from a frame that already was a JPEG: the second encoding loses a little more, and each tile is encoded independently.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from fvlm_core.data.batch import Sample
from fvlm_core.data.frames import encode_jpeg
from fvlm_core.errors import UserError

MARK = b"fvlm"
_END = struct.Struct("<HH4s")
"""End of the trailer, after a uint32 with the size of each JPEG: tiles per side, pixels per side of a tile, the mark. Little-endian."""

Bytes = bytes | memoryview


def tiled(jpeg: bytes, tile_px: int, small_px: int) -> bytes:
    """Convert a square JPEG to tiles of `tile_px` and a small frame of `small_px`. Raises ValueError if these do not divide its side."""
    frame = simplejpeg.decode_jpeg(jpeg, "RGB")
    side = frame.shape[0]
    if frame.shape[1] != side or side % tile_px or side % small_px:
        raise ValueError(f"a frame of {frame.shape[1]}x{side} px is not cut into tiles of {tile_px} px and a small frame of {small_px} px")
    n = side // tile_px
    squares = frame.reshape(n, tile_px, n, tile_px, 3).swapaxes(1, 2).reshape(-1, tile_px, tile_px, 3)
    step = side // small_px
    small = frame.reshape(small_px, step, small_px, step, 3).mean((1, 3), dtype=np.float32).round().astype(np.uint8)
    parts = [encode_jpeg(picture) for picture in (small, *squares)]
    return b"".join([*parts, struct.pack(f"<{len(parts)}I", *map(len, parts)), _END.pack(n, tile_px, MARK)])


@dataclass(frozen=True)
class TiledFrame:
    """A frame stored as tiles."""

    small: Bytes
    tiles: list[Bytes]
    """JPEGs, row by row."""
    tile_px: int

    @classmethod
    def parse(cls, content: Bytes) -> "TiledFrame | None":
        """Parse a stored frame; returns None for a plain JPEG. Raises ValueError if it is truncated."""
        if bytes(content[-len(MARK) :]) != MARK:
            return None
        n, tile_px, _ = _END.unpack(content[-_END.size :])
        count, end = n * n + 1, len(content) - _END.size
        start = end - 4 * count
        sizes = struct.unpack(f"<{count}I", content[max(start, 0) : end]) if start >= 0 else ()
        if sum(sizes) != start:
            raise ValueError("a tiled frame is not as long as its parts")
        ends = np.cumsum(sizes).tolist()
        small, *tiles = (content[last - size : last] for size, last in zip(sizes, ends, strict=True))
        return cls(small, tiles, tile_px)

    @property
    def side(self) -> int:
        """Pixels along the frame's side."""
        return round(len(self.tiles) ** 0.5) * self.tile_px

    def decode(self, out: np.ndarray) -> None:
        """Decode the whole frame into `out`, uint8 [side, side, 3]. Raises ValueError for a damaged tile."""
        n = self.side // self.tile_px
        for number in range(len(self.tiles)):
            row, column = (at * self.tile_px for at in divmod(number, n))
            out[row : row + self.tile_px, column : column + self.tile_px] = self.tile(number)

    def tile(self, number: int) -> np.ndarray:
        """Decode one tile, uint8 [tile_px, tile_px, 3]. Raises ValueError if it is damaged."""
        found = simplejpeg.decode_jpeg(self.tiles[number], "RGB")
        if found.shape[:2] != (self.tile_px, self.tile_px):
            raise ValueError(f"a tile is {found.shape[1]}x{found.shape[0]}, not {self.tile_px}x{self.tile_px}")
        return found


@dataclass(frozen=True)
class TiledFrames:
    """F frames whose tiles are decoded on demand, each at most once."""

    frames: Sequence[TiledFrame]
    where: str
    """Where the frames come from, for error messages."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Device of the squares that are returned."""
    decoded: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    """Decoded tiles, by the frame's `id` and the number of the tile."""

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def side(self) -> int:
        """Pixels along a frame's side."""
        return self.frames[0].side

    def select(self, frames: Tensor) -> "TiledFrames":
        """Return some of the frames, by their indexes, int64 [f]."""
        return TiledFrames([self.frames[number] for number in frames.tolist()], self.where, self.device, self.decoded)

    def squares(self, frame: Tensor, down: Tensor, right: Tensor, side: int) -> Tensor:
        """Return squares of `side` px from frames divided into a grid of such squares: uint8 [R * n, side, side, 3].

        `frame` int64 [R]: the frame of each group of n squares; `down` and `right` int64 [R, n]: their rows and columns in the grid. Raises
        UserError for a damaged tile.
        """
        out = np.empty((down.numel(), side, side, 3), np.uint8)
        places = zip(frame.tolist(), down.tolist(), right.tolist(), strict=True)
        squares = ((number, y * side, x * side) for number, rows, columns in places for y, x in zip(rows, columns, strict=True))
        for into, (number, top, left) in zip(out, squares, strict=True):
            self._copy(self.frames[number], top, left, into)
        return torch.from_numpy(out).to(self.device)

    def to(self, device: torch.device) -> "TiledFrames":
        """Return the same frames, with squares on a device."""
        return replace(self, device=device)

    def _copy(self, frame: TiledFrame, top: int, left: int, into: np.ndarray) -> None:
        """Copy the square at `top`, `left` from the tiles that it overlaps."""
        px, side, n = frame.tile_px, len(into), frame.side // frame.tile_px
        for row in range(top // px, -(-(top + side) // px)):
            for column in range(left // px, -(-(left + side) // px)):
                first, last = max(row * px, top), min((row + 1) * px, top + side)
                start, end = max(column * px, left), min((column + 1) * px, left + side)
                tile = self._tile(frame, row * n + column)
                into[first - top : last - top, start - left : end - left] = tile[
                    first - row * px : last - row * px, start - column * px : end - column * px
                ]

    def _tile(self, frame: TiledFrame, number: int) -> np.ndarray:
        key = id(frame), number
        if key not in self.decoded:
            try:
                self.decoded[key] = frame.tile(number)
            except ValueError as error:
                raise UserError(f"tile {number} of a frame is damaged: {error}", where=self.where, fix="make the shards again") from error
        return self.decoded[key]


@dataclass(frozen=True)
class TiledSample(Sample):
    """A sample whose `frames` are only the small frames."""

    tiles: TiledFrames | None = None
    """The full frames, in the same order."""


def tiles_of(samples: Sequence[Sample]) -> TiledFrames | None:
    """Return the tiles of a batch's frames in the order of its samples. Frames that several samples share occur once.

    Returns None if the frames of a sample are decoded in full.
    """
    distinct = {id(sample.frames): sample for sample in samples if len(sample.frames)}
    tiles = [sample.tiles for sample in distinct.values() if isinstance(sample, TiledSample) and sample.tiles is not None]
    if not tiles or len(tiles) < len(distinct):
        return None
    return TiledFrames([frame for one in tiles for frame in one.frames], "; ".join(one.where for one in tiles))
