"""A generated world of G x G cells, each with a digit, all redrawn in every frame: what is asked can be read in full resolution only.

A cell is one DINOv2 patch of 14 px and a digit has the 8 px that scikit-learn's set was recorded with, so that a frame seen at a third of
its side shows where there is a digit, and not which. Digits of the validation split are never drawn in training. Everything is a pure
function of the generator passed in.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fvlm_core.data.batch import ChatFormat, Sample, Turn
from fvlm_core.data.gaze import CELL_PX, EMPTY, digits_of
from fvlm_core.data.rows import Split

DIGIT_PX = 8
JITTER_PX = 1
"""A digit stands at most so far from the middle of its cell."""
NOISE = 26
"""The background's brightness is uniform below it."""
CHAT = ChatFormat(system=[], user_open=[], user_close=[], assistant_open=[10], assistant_close=[11])
"""Tokens 0 to 9 are the digits; after the two markers come a token per row and one per column."""
FIRST_PLACE = 12


@dataclass(frozen=True)
class World:
    """B clips of T frames, and what is on them."""

    frames: np.ndarray
    """uint8 [B, T, S, S, 3]."""
    digits: np.ndarray
    """int [B, T, G, G]: the digit in each cell, or EMPTY."""
    cells: np.ndarray
    """int [B, 2]: row and column of the cell that is asked about; it has a digit in every frame."""


def render(rng: np.random.Generator, split: Split, *, grid: int, clips: int, frames: int = 3, clutter: float = 1.0) -> World:
    """Draw clips of `grid` x `grid` cells; a cell that is not asked about has a digit with probability `clutter`."""
    images, labels = digits_of(split, DIGIT_PX)
    shape = (clips, frames, grid, grid)
    cells = rng.integers(grid, size=(clips, 2))
    present = rng.random(shape) < clutter
    present[np.arange(clips), :, cells[:, 0], cells[:, 1]] = True
    chosen = rng.integers(len(labels), size=shape)
    shift = rng.integers(-JITTER_PX, JITTER_PX + 1, size=(*shape, 2)) + (CELL_PX - DIGIT_PX) // 2
    canvas = rng.integers(NOISE, size=(*shape, CELL_PX, CELL_PX, 3), dtype=np.uint8)
    drawn = images[chosen[present]][..., None].astype(np.uint8)
    cell, places = canvas[present], shift[present]
    for y, x in np.unique(places, axis=0).tolist():
        here = (places == (y, x)).all(1)
        window = np.s_[here, y : y + DIGIT_PX, x : x + DIGIT_PX]
        cell[window] = np.maximum(cell[window], drawn[here])
    canvas[present] = cell
    pixels = canvas.transpose(0, 1, 2, 4, 3, 5, 6).reshape(clips, frames, grid * CELL_PX, grid * CELL_PX, 3)
    return World(pixels, np.where(present, labels[chosen], EMPTY), cells)


def samples(world: World) -> Iterator[Sample]:
    """A sample per clip: row and column of a cell, the frames, and the digits that the cell shows."""
    grid = world.digits.shape[-1]
    for frames, digits, (row, column) in zip(world.frames, world.digits, world.cells.tolist(), strict=True):
        turn = Turn([FIRST_PLACE + row, FIRST_PLACE + grid + column], digits[:, row, column].tolist())
        yield Sample("cell", "cells", frames, [list(range(len(frames)))], [turn], question_first=True)


def vocabulary(grid: int) -> int:
    """Number of tokens."""
    return FIRST_PLACE + 2 * grid
