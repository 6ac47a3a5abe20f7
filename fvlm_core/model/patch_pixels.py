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
    rows, columns = frames.shape[1] // side, frames.shape[2] // side
    lines = frames.contiguous().view(-1, side * 3)  # [F * H * columns, side * 3]: a line of a square is contiguous, and copied as a whole
    line = ((frame[:, None] * rows + down) * side)[..., None] + torch.arange(side, device=down.device)  # [R, n, side], over all frames
    return lines.index_select(0, (line * columns + right[..., None]).flatten()).view(-1, side, side, 3)
