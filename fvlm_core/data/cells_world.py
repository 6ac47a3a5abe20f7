"""Generated worlds of G x G cells with digits that can only be read at full resolution. Each world needs another way of looking.

=====  ====================================================================================================================
asked  every cell is redrawn in every frame; the question names the target cell
still  one digit changes per frame and is redrawn near its old place; it is the target, and the question names nothing
hunt   every cell is redrawn in every frame; the question names the first target, whose digit gives the row of the next, and so on
=====  ====================================================================================================================

A cell is one DINOv2 patch of 14 px, and a digit has the 8 px of scikit-learn's set. So a frame at a third of its side shows where digits
are, but not which. Digits of the validation split are never drawn in training. Everything is a pure function of the generator passed in.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fvlm_core.data.batch import ChatFormat, Sample, Turn
from fvlm_core.data.gaze import CELL_PX, EMPTY, digits_of
from fvlm_core.data.rows import Split

Name = Literal["asked", "still", "hunt"]
WORLDS: tuple[Name, ...] = ("asked", "still", "hunt")

DIGIT_PX = 8
JITTER_PX = 1
"""Maximum distance of a digit from the centre of its cell."""
NOISE = 26
"""Upper bound of the background's brightness, which is uniform and drawn anew in every frame of every world."""
BLOCK = 3
"""In the still world, each block of this many cells per side has at most one digit."""
CHAT = ChatFormat(system=[], user_open=[], user_close=[], assistant_open=[10], assistant_close=[11])
"""Tokens 0 to 9 are the digits, 10 and 11 the markers; then come one token per row and one per column."""
FIRST_PLACE = 12


@dataclass(frozen=True)
class World:
    """B clips of T frames, and what they show."""

    frames: np.ndarray
    """uint8 [B, T, S, S, 3]."""
    digits: np.ndarray
    """int [B, T, G, G]: the digit in each cell, or EMPTY."""
    path: np.ndarray
    """int [B, T, 2]: row and column of each frame's target cell, which has a digit. The first frame of a still world has no target."""
    name: Name = "asked"

    @property
    def cells(self) -> np.ndarray:
        """int [B, 2]: row and column of the first target cell."""
        return self.path[:, 0]

    @property
    def answers(self) -> np.ndarray:
        """int [B, T]: the target digits; [B, T - 1] for a still world, because its first frame has no target."""
        counted = np.take_along_axis(self.digits.reshape(*self.digits.shape[:2], -1), self.places[..., None], 2)[..., 0]
        return counted[:, self.name == "still" :]

    @property
    def places(self) -> np.ndarray:
        """int [B, T]: the target cells, numbered row by row."""
        return self.path @ np.array([self.digits.shape[-1], 1])


def render(
    rng: np.random.Generator, split: Split, *, grid: int, clips: int, frames: int = 3, clutter: float = 1.0, name: Name = "asked"
) -> World:
    """Draw clips of `grid` x `grid` cells. A cell other than the target has a digit with probability `clutter`.

    A still world has at most one digit per block of `BLOCK` x `BLOCK` cells; a block that never changes has one with probability `clutter`.
    """
    if name == "still":
        return _still(rng, split, grid, clips, frames, clutter)
    images, labels = digits_of(split, DIGIT_PX)
    shape = (clips, frames, grid, grid)
    cells = rng.integers(grid, size=(clips, 2))
    present = rng.random(shape) < clutter
    chosen = rng.integers(len(labels), size=shape)
    path = cells[:, None].repeat(frames, 1)
    if name == "hunt":
        for t in range(1, frames):
            path[:, t, 0] = labels[chosen[np.arange(clips), t - 1, *path[:, t - 1].T]] % grid
    present[np.arange(clips)[:, None], np.arange(frames), path[..., 0], path[..., 1]] = True
    pixels = _draw(rng, images[chosen], present, _jitter(rng, shape))
    return World(pixels, np.where(present, labels[chosen], EMPTY), path, name)


def samples(world: World) -> Iterator[Sample]:
    """Yield one sample per clip: the question (row and column of a cell, or nothing), the frames, and the target digits."""
    grid = world.digits.shape[-1]
    for frames, answers, (row, column) in zip(world.frames, world.answers.tolist(), world.cells.tolist(), strict=True):
        named = [FIRST_PLACE + row, FIRST_PLACE + grid + column]
        turn = Turn(2 * CHAT.assistant_close if world.name == "still" else named, answers)
        yield Sample("cell", "cells", frames, [list(range(len(frames)))], [turn], question_first=True)


def vocabulary(grid: int) -> int:
    """Return the number of tokens."""
    return FIRST_PLACE + 2 * grid


def _still(rng: np.random.Generator, split: Split, grid: int, clips: int, frames: int, clutter: float) -> World:
    images, labels = digits_of(split, DIGIT_PX)
    side = grid // BLOCK
    shape = (clips, frames, side**2)
    changed = rng.integers(side**2, size=(clips, frames))
    counts = (changed[:, 1:, None] == np.arange(side**2)).any(1)
    drawn = ((rng.random((clips, side**2)) < clutter) | counts)[:, None].repeat(frames, 1)
    chosen, where, shift = rng.integers(len(labels), size=shape), rng.integers(BLOCK**2, size=shape), _jitter(rng, shape)
    for t in range(1, frames):
        same = changed[:, t, None] != np.arange(side**2)
        for part in (chosen, where, shift):
            part[:, t][same] = part[:, t - 1][same]
    rows = np.arange(side**2) // side * BLOCK + where // BLOCK
    columns = np.arange(side**2) % side * BLOCK + where % BLOCK
    at = (np.arange(clips)[:, None, None], np.arange(frames)[:, None], rows, columns)
    present, digit_of = np.zeros((clips, frames, grid, grid), bool), np.zeros((clips, frames, grid, grid), int)
    moved = np.zeros((*present.shape, 2), int)
    present[at], digit_of[at], moved[at] = drawn, chosen, shift
    new = (np.arange(clips)[:, None], np.arange(frames), changed)
    pixels = _draw(rng, images[digit_of], present, moved)
    return World(pixels, np.where(present, labels[digit_of], EMPTY), np.stack([rows[new], columns[new]], -1), "still")


def _jitter(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw the position of each digit in its cell: rows and columns, int [*shape, 2]."""
    return rng.integers(-JITTER_PX, JITTER_PX + 1, size=(*shape, 2)) + (CELL_PX - DIGIT_PX) // 2


def _draw(rng: np.random.Generator, digits: np.ndarray, present: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Draw the digits [B, T, G, G, px, px] that are `present` on noise: uint8 [B, T, S, S, 3]."""
    clips, frames, grid = present.shape[:3]
    canvas = rng.integers(NOISE, size=(*present.shape, CELL_PX, CELL_PX, 3), dtype=np.uint8)
    drawn = digits[present][..., None].astype(np.uint8)
    cell, places = canvas[present], shift[present]
    for y, x in np.unique(places, axis=0).tolist():
        here = (places == (y, x)).all(1)
        window = np.s_[here, y : y + DIGIT_PX, x : x + DIGIT_PX]
        cell[window] = np.maximum(cell[window], drawn[here])
    canvas[present] = cell
    return canvas.transpose(0, 1, 2, 4, 3, 5, 6).reshape(clips, frames, grid * CELL_PX, grid * CELL_PX, 3)
