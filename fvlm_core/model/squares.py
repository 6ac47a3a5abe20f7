"""The pixels of opened patches: squares cut out of frames that are there, or decoded when they are asked for."""

from typing import Protocol

import torch
from torch import Tensor


class StoredFrames(Protocol):
    """F frames of which a part is decoded when it is opened."""

    @property
    def device(self) -> torch.device:
        """Where squares are wanted."""
        ...

    def __len__(self) -> int: ...

    def select(self, frames: Tensor) -> "StoredFrames":
        """Some of them, int64 [f]."""
        ...

    def squares(self, frame: Tensor, down: Tensor, right: Tensor, side: int) -> Tensor:
        """As the function `squares`."""
        ...


def select(frames: Tensor | StoredFrames, chosen: Tensor) -> Tensor | StoredFrames:
    """Some of the frames; `chosen` int64 [f]."""
    return frames.index_select(0, chosen) if isinstance(frames, Tensor) else frames.select(chosen)


def squares(frames: Tensor | StoredFrames, frame: Tensor, down: Tensor, right: Tensor, side: int) -> Tensor:
    """The squares of `side` px in row `down` and column `right` [R, n] of frames uint8 [F, H, W, 3] cut into such: [R * n, side, side, 3].

    `frame` int64 [R]: the frame of each row. `side` divides the frames' sides.
    """
    if not isinstance(frames, Tensor):
        return frames.squares(frame, down, right, side)
    lines = frames.contiguous().flatten(2)  # [F, H, W * 3]
    moved = next(kind for kind in (torch.int64, torch.int32, torch.int16, torch.uint8) if side * 3 % kind.itemsize == 0)
    grid = frames.shape[1] // side, frames.shape[2] // side
    # indexing takes its time by numbers, not by bytes, so several bytes move as one number; [F, rows, columns, side, side * 3 bytes]
    cut = lines.view(moved).unflatten(1, (grid[0], -1)).unflatten(3, (grid[1], -1)).transpose(2, 3)
    return cut[frame[:, None], down, right].flatten(0, 1).view(torch.uint8).unflatten(2, (-1, 3))
