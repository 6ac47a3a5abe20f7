"""Generated worlds of G x G cells with digits: what is asked can be read in full resolution only, and each asks for another way to look.

=====  ====================================================================================================================
asked  every cell is redrawn in every frame; the question names the cell that counts
still  nothing changes but one digit a frame, which is drawn anew near its old place; it counts, and the question names nothing
hunt   every cell is redrawn in every frame; the question names the first that counts, its digit the row of the next, and so on
=====  ====================================================================================================================

A cell is one DINOv2 patch of 14 px and a digit has the 8 px that scikit-learn's set was recorded with, so that a frame seen at a third of
its side shows where there is a digit, and not which. Digits of the validation split are never drawn in training. Everything is a pure
function of the generator passed in.
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
"""A digit stands at most so far from the middle of its cell."""
NOISE = 26
"""The background's brightness is uniform below it, drawn anew in every frame of every world."""
BLOCK = 3
"""In the still world every block of so many cells a side has one digit."""
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
    path: np.ndarray
    """int [B, T, 2]: row and column of the cell that counts in each frame; it has a digit. Nothing counts in a still world's first."""
    name: Name = "asked"

    @property
    def cells(self) -> np.ndarray:
        """int [B, 2]: row and column of the cell that counts first."""
        return self.path[:, 0]

    @property
    def answers(self) -> np.ndarray:
        """int [B, T]: the digits that count; of a still world [B, T - 1], because its first frame has nothing new."""
        counted = np.take_along_axis(self.digits.reshape(*self.digits.shape[:2], -1), self.places[..., None], 2)[..., 0]
        return counted[:, self.name == "still" :]

    @property
    def places(self) -> np.ndarray:
        """int [B, T]: the cells that count, numbered row by row."""
        return self.path @ np.array([self.digits.shape[-1], 1])


def render(
    rng: np.random.Generator, split: Split, *, grid: int, clips: int, frames: int = 3, clutter: float = 1.0, name: Name = "asked"
) -> World:
    """Draw clips of `grid` x `grid` cells; a cell that does not count has a digit with probability `clutter`.

    A still world has at most a digit per block of `BLOCK` x `BLOCK` cells; one that never changes has it with probability `clutter`.
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
    """A sample per clip: the question (row and column of a cell, or nothing), the frames, and the digits that count."""
    grid = world.digits.shape[-1]
    for frames, answers, (row, column) in zip(world.frames, world.answers.tolist(), world.cells.tolist(), strict=True):
        named = [FIRST_PLACE + row, FIRST_PLACE + grid + column]
        turn = Turn(2 * CHAT.assistant_close if world.name == "still" else named, answers)
        yield Sample("cell", "cells", frames, [list(range(len(frames)))], [turn], question_first=True)


def vocabulary(grid: int) -> int:
    """Number of tokens."""
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
    """Where in its cell each digit stands: rows and columns [*shape, 2]."""
    return rng.integers(-JITTER_PX, JITTER_PX + 1, size=(*shape, 2)) + (CELL_PX - DIGIT_PX) // 2


def _draw(rng: np.random.Generator, digits: np.ndarray, present: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Pixels uint8 [B, T, S, S, 3] of digits [B, T, G, G, px, px], where they are `present`, on noise."""
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
