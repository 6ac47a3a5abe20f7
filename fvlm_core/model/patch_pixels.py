"""The pixels of opened patches: squares cut out of frames in memory, or decoded on demand from stored frames."""

from typing import Protocol

import torch
from torch import Tensor


class StoredFrames(Protocol):
    """F compressed frames that decode only the requested squares."""

    @property
    def device(self) -> torch.device:
        """Device of the squares that `squares` returns."""
        ...

    def __len__(self) -> int: ...

    def select(self, frames: Tensor) -> "StoredFrames":
        """Return the frames with indices `frames` int64 [f]."""
        ...

    def squares(self, frame: Tensor, down: Tensor, right: Tensor, side: int) -> Tensor:
        """As the module's function `patch_pixels`."""
        ...


def select(frames: Tensor | StoredFrames, chosen: Tensor) -> Tensor | StoredFrames:
    """Return the frames with indices `chosen` int64 [f]."""
    return frames.index_select(0, chosen) if isinstance(frames, Tensor) else frames.select(chosen)


def patch_pixels(frames: Tensor | StoredFrames, frame: Tensor, down: Tensor, right: Tensor, side: int) -> Tensor:
    """Cut squares out of frames uint8 [F, H, W, 3] -> uint8 [R * n, side, side, 3].

    Frames are divided into a grid of `side` x `side` px squares, where `side` divides H and W. `frame` int64 [R]: frame index of each row.
    `down`, `right` int64 [R, n]: grid rows and columns.
    """
    if not isinstance(frames, Tensor):
        return frames.squares(frame, down, right, side)
    lines = frames.contiguous().flatten(2)  # [F, H, W * 3]
    moved = next(kind for kind in (torch.int64, torch.int32, torch.int16, torch.uint8) if side * 3 % kind.itemsize == 0)
    grid = frames.shape[1] // side, frames.shape[2] // side
    # indexing takes time per element, not per byte, so view several bytes as one integer: [F, rows, columns, side, side * 3 bytes]
    cut = lines.view(moved).unflatten(1, (grid[0], -1)).unflatten(3, (grid[1], -1)).transpose(2, 3)
    return cut[frame[:, None], down, right].flatten(0, 1).view(torch.uint8).unflatten(2, (-1, 3))
