"""The pixels of opened patches: squares out of frames that are there, or decoded when they are asked for, and made smaller."""

from typing import Protocol

import torch
from torch import Tensor

SHRUNK_IN_PLACE_PX = 256
"""From this side on, a square of a CPU's frame is made smaller where it lies, one after another: to copy it first takes longer."""


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


def shrunk_squares(frames: Tensor | StoredFrames, frame: Tensor, down: Tensor, right: Tensor, side: int, times: int) -> Tensor:
    """`squares` at 1 / `times` of their side: float32 [R * n, side / times, side / times, 3], or as they are where `times` is 1."""
    if times > 1 and side >= SHRUNK_IN_PLACE_PX and isinstance(frames, Tensor) and frames.device.type == "cpu":
        places = zip(frame.repeat_interleave(down.shape[1]).tolist(), down.flatten().tolist(), right.flatten().tolist(), strict=True)
        each = (frames[number, y * side : (y + 1) * side, x * side : (x + 1) * side] for number, y, x in places)
        return torch.cat([shrunk(square[None], times) for square in each])
    found = squares(frames, frame, down, right, side)
    return shrunk(found, times) if times > 1 else found


def shrunk(frames: Tensor, times: int) -> Tensor:
    """Frames uint8 [F, H, W, 3] at 1 / `times` of their side, float32: the mean of each square of `times` x `times` pixels."""
    apart = frames.unflatten(1, (-1, times))
    rows = apart[:, :, 0].to(torch.int32 if times > 128 else torch.int16)
    for number in range(1, times):  # `sum` would first make all of the frame as wide as its result
        rows += apart[:, :, number]
    return rows.unflatten(2, (-1, times)).sum(3, dtype=torch.int32).float() / times**2
