"""The generated gaze benchmark: real handwritten digits on a grid, all redrawn in every frame, and questions about some of them.

One token per frame cannot hold nine digits, so a question about one cell separates a model that looks at that cell from one that sees
the frame as a whole. In every task, each frame has one target cell. The tasks differ in how it is found:

=======  ==================================================================================================================
cell     the question names it; it is the same in all frames
colour   the question names a colour that exactly one digit of every frame has; on the usual grid all digits differ in colour
hunt     the question names the first; a cross in each frame marks the target of the next
track    the question names the first; each next one is a neighbouring cell with a digit of the first one's colour
caption  it is the only one with white digits; the answer also names its place
=======  ==================================================================================================================

Everything is a pure function of the generator passed in. The digits of the two splits are by different writers (`fvlm_core.data.digits`).
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from PIL import Image

from fvlm_core.data.digits import digits_of
from fvlm_core.data.rows import Split

Task = Literal["cell", "colour", "hunt", "track", "caption"]
TASKS: tuple[Task, ...] = ("cell", "colour", "hunt", "track", "caption")
OF_A_PLACE: tuple[Task, ...] = ("cell", "caption")
"""Tasks whose target cell is the same in all frames."""
OF_A_COLOUR: tuple[Task, ...] = ("colour", "track")
"""Tasks whose target digits have the same colour in all frames."""
GRID = 3
"""Cells per side of the usual grid, which is the default."""
CELL_PX = 14
"""Side of a cell at scale 1: one patch of DINOv2."""
FRAME_PX = GRID * CELL_PX
DIGIT_PX = 12
"""Side of a digit at scale 1; it is shifted by at most one pixel in its cell."""
EMPTY, CROSS = -1, -2
"""In place of a digit: an empty cell, and the cross of `hunt`."""
N_CHOICES = 4
"""Options of a multiple-choice question."""
COLOURS = {
    "red": (255, 40, 40),
    "green": (40, 220, 40),
    "blue": (80, 110, 255),
    "yellow": (250, 230, 40),
    "pink": (255, 90, 220),
    "white": (245, 245, 245),
    "orange": (255, 140, 20),
    "cyan": (50, 220, 230),
    "violet": (150, 70, 240),
}
FEWEST_COLOURS = 6
"""All tasks but `colour` use this many of COLOURS, from the first; `colour` has one for each cell of the usual grid."""
WHITE = list(COLOURS).index("white")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")

Conversation = list[dict[str, str]]
"""Turns, each `{"question", "answer"}`."""


@dataclass(frozen=True)
class GazeClip:
    """A rendered clip and what it shows."""

    frames: np.ndarray
    """uint8 [T, S, S, 3], one frame per second."""
    digits: np.ndarray
    """int [T, G, G]: the digit in each cell, or EMPTY, or CROSS."""
    colours: np.ndarray
    """int [T, G, G]: index into COLOURS."""
    path: np.ndarray
    """int [T, 2]: row and column of the target cell in each frame; it always has a digit."""
    task: Task
    originals: np.ndarray
    """int [T, G, G]: the handwritten digit in each cell, as an index into the split's originals (`digits_of`), or EMPTY. A digit and its
    distorted copies have the same index."""

    @property
    def answer(self) -> str:
        """The target digits, one character per frame."""
        return "".join(str(digit) for digit in self.digits[np.arange(len(self.path)), *self.path.T])

    @property
    def asked_originals(self) -> np.ndarray:
        """int [T]: the handwritten digit in each frame's target cell, as an index into the split's originals."""
        return self.originals[np.arange(len(self.path)), *self.path.T]

    @property
    def crosses(self) -> np.ndarray:
        """int [T]: the cell of each frame's cross, numbered row by row from 0. Only `hunt` clips have crosses."""
        return (self.digits == CROSS).reshape(len(self.digits), -1).argmax(1)

    @property
    def place(self) -> str:
        """Name of the first frame's target cell."""
        row, column = self.path[0].tolist()
        return cell_name(row, column, self.digits.shape[-1])

    @property
    def colour(self) -> str:
        """Colour of the first target digit."""
        return list(COLOURS)[self.colours[0, *self.path[0]]]


def render(
    rng: np.random.Generator,
    split: Split,
    *,
    task: Task = "cell",
    frames: int,
    grid: int = GRID,
    scale: int = 1,
    clutter: float = 1.0,
    noise: float = 0.05,
    copies: int = 0,
    colours: int | None = None,
) -> GazeClip:
    """Draw a clip of `frames` frames of `grid` x `grid` cells, each of `scale` times 14 px.

    The target cell has a digit; each other cell has one with probability `clutter`. `noise` is the standard deviation of the dark
    background, as a share of full brightness. Digits are chosen from the originals and `copies` distorted copies of each (`digits_of`), and
    have the first `colours` of COLOURS, by default `usual_colours(task)`. Raises ValueError for a grid of one cell, or if `colours` is not
    from 6 to 9.
    """
    if grid < 2:
        raise ValueError(f"a grid needs at least 2 x 2 cells, not {grid} x {grid}")
    count = usual_colours(task) if colours is None else colours
    if not FEWEST_COLOURS <= count <= len(COLOURS):
        raise ValueError(f"a clip has {FEWEST_COLOURS} to {len(COLOURS)} colours, not {count}")
    labels = digits_of(split, DIGIT_PX * scale, copies)[1]
    shape = frames, grid, grid
    path = _path(rng, task, frames, grid)
    times = np.arange(frames)
    present = rng.random(shape) < clutter
    chosen = rng.integers(len(labels), size=shape)
    of_digits = rng.integers(count, size=shape)
    jitter = rng.integers(-scale, scale + 1, size=(*shape, 2))
    sign = rng.integers(grid**2 - 1, size=frames)
    if task in OF_A_COLOUR:
        of_digits = _each_once(rng, path, grid, count)
    if task == "caption":  # white is nowhere else
        of_digits = (WHITE + 1 + rng.integers(count - 1, size=shape)) % count
        of_digits[times, *path.T] = WHITE
    present[times, *path.T] = True
    digits = np.where(present, labels[chosen], EMPTY)
    if task == "hunt":  # nothing follows the last frame: its cross is anywhere but on its target
        last = (path[-1] @ (grid, 1) + 1 + sign[-1]) % grid**2
        crosses = np.append(path[1:], [divmod(int(last), grid)], axis=0)
        digits[times, *crosses.T] = CROSS
    pixels = _draw(_bordered(split, DIGIT_PX * scale, copies), digits, of_digits, chosen, jitter, scale)
    drawn = rng.integers(256, size=(frames, grid * CELL_PX, grid * CELL_PX, 3), dtype=np.uint8)
    background = _noise(noise)[drawn]
    if scale > 1:
        background = background.repeat(scale, axis=1).repeat(scale, axis=2)
    originals = np.where(digits >= 0, chosen % (len(labels) // (1 + copies)), EMPTY)
    return GazeClip(np.maximum(pixels, background), digits, of_digits, path, task, originals)


def largest_scale(frame_px: int) -> int:
    """Return the largest scale at which the usual grid fits into frames of this side."""
    return max(1, frame_px // FRAME_PX)


def render_to_fit(rng: np.random.Generator, split: Split, frame_px: int, **options: Any) -> GazeClip:
    """Like `render`, for frames of any side: drawn at the largest scale that fits, then enlarged (bilinear)."""
    clip = render(rng, split, scale=largest_scale(frame_px), **options)
    if clip.frames.shape[1] == frame_px:
        return clip
    size = frame_px, frame_px
    frames = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR)) for frame in clip.frames]
    return replace(clip, frames=np.stack(frames))


def cells_of_patches(patches: int) -> np.ndarray:
    """Return the row (or column) of the usual grid that contains the centre of each of `patches` patches along a side: int [patches]."""
    return ((np.arange(patches) + 0.5) / patches * GRID).astype(int)


def usual_colours(task: Task) -> int:
    """Return how many of COLOURS the clips of a task use by default."""
    return len(COLOURS) if task == "colour" else FEWEST_COLOURS


def _path(rng: np.random.Generator, task: Task, frames: int, grid: int) -> np.ndarray:
    """Draw the target cell of each frame: int [T, 2]."""
    anywhere = rng.integers(grid, size=(frames, 2))
    if task in OF_A_PLACE:
        return anywhere[:1].repeat(frames, 0)
    if task == "hunt":  # never the same cell twice in a row: the target of the next frame has the cross
        steps = rng.integers(1, grid**2, size=frames)
        steps[0] = anywhere[0] @ (grid, 1)
        return np.stack(np.divmod(np.cumsum(steps) % grid**2, grid), 1)
    if task == "track":
        path = anywhere
        for t in range(1, frames):
            beside = [(row, column) for row, column in np.ndindex(grid, grid) if np.abs(path[t - 1] - (row, column)).max() == 1]
            path[t] = beside[rng.integers(len(beside))]
        return path
    return anywhere


def _each_once(rng: np.random.Generator, path: np.ndarray, grid: int, count: int) -> np.ndarray:
    """Draw the colours of all cells: int [T, G, G]. In each frame, all but one of `count` colours occur once; that one fills the rest.

    The target cell has the same colour in all frames, one that occurs once, so it does not stand out to a model that does not know the
    question.
    """
    others = count - 1
    wanted = int(rng.integers(count))
    order = rng.integers(2**31, size=(len(path), grid, grid))
    times = np.arange(len(path))
    repeated = order[times, *path.T] % others
    order[times, *path.T] = -1
    ranks = order.reshape(len(path), -1).argsort(1).argsort(1).reshape(order.shape)
    colours = (wanted + 1 + (repeated[:, None, None] + np.minimum(ranks, others)) % others) % count
    return np.where(ranks == 0, wanted, colours)


def _draw(images: np.ndarray, digits: np.ndarray, colours: np.ndarray, chosen: np.ndarray, jitter: np.ndarray, scale: int) -> np.ndarray:
    """Draw digits (`chosen` are indexes of bordered `images`) and crosses on black: uint8 [T, S, S, 3]."""
    cell, size = CELL_PX * scale, DIGIT_PX * scale
    places = np.arange(cell) - (CELL_PX - DIGIT_PX) // 2 * scale - jitter[..., None]  # [T, G, G, 2, cell]: pixel of the digit
    places = np.minimum(np.maximum(places, -1), size) + 1  # beyond a digit's edge is its border
    bright = images[chosen[..., None, None], places[..., 0, :, None], places[..., 1, None, :]]  # [T, G, G, cell, cell]
    bright[digits < 0] = 0
    bright[digits == CROSS] = _cross(scale)
    palette = np.array(list(COLOURS.values()), np.uint16)[np.where(digits == CROSS, WHITE, colours)]
    painted = (bright[..., None] * palette[..., None, None, :] // 255).astype(np.uint8)
    frames, grid = digits.shape[:2]
    return painted.swapaxes(2, 3).reshape(frames, grid * cell, grid * cell, 3)


@lru_cache(maxsize=8)
def _bordered(split: Split, size_px: int, copies: int) -> np.ndarray:
    """The split's digits with a border of one dark pixel: uint16 [N, size_px + 2, size_px + 2]."""
    return np.pad(digits_of(split, size_px, copies)[0], ((0, 0), (1, 1), (1, 1)))


@lru_cache
def _noise(std: float) -> np.ndarray:
    """Brightness of 256 equally likely background pixels, uint8 [256]: quantiles of a half-normal distribution."""
    quantiles = [NormalDist().inv_cdf(0.5 + (number + 0.5) / 512) for number in range(256)]
    return np.clip(np.array(quantiles) * 255 * std, 0, 255).astype(np.uint8)


@lru_cache
def _cross(scale: int) -> np.ndarray:
    """Brightness uint16 [cell, cell] of a diagonal cross with strokes of 2 px at scale 1."""
    here = np.arange(CELL_PX * scale) + 0.5
    side = CELL_PX * scale
    strokes = np.minimum(np.abs(here[:, None] - here), np.abs(here[:, None] + here - side)) <= scale
    inside = np.abs(here - side / 2) <= DIGIT_PX * scale / 2
    return np.where(strokes & inside & inside[:, None], 255, 0).astype(np.uint16)


def cell_name(row: int, column: int, grid: int = GRID) -> str:
    """Return the name of a cell, e.g. `top left`, or `row 2 column 4` on grids other than 3 x 3."""
    return f"{ROWS[row]} {COLUMNS[column]}" if grid == GRID else f"row {row + 1} column {column + 1}"


def caption(clip: GazeClip) -> str:
    """Return the caption of a clip whose task is in `OF_A_PLACE`, e.g. `371 at the top left`."""
    return f"{clip.answer} at the {clip.place}"


def reading(clip: GazeClip) -> str:
    """Return all cells of the first frame, row by row, e.g. `371 205 998`; `-` stands for an empty cell."""
    return " ".join("".join(str(digit) if digit >= 0 else "-" for digit in row) for row in clip.digits[0])


def question(clip: GazeClip) -> str:
    """Return the question about the clip's target cells."""
    if clip.task == "caption":
        return "Which digits are white, and where?"
    many = "digits are" if len(clip.digits) > 1 else "digit is"
    return {
        "cell": f"Which {many} at the {clip.place}?",
        "colour": f"Which {many} {clip.colour}?",
        "hunt": f"Start at the {clip.place} and go where the cross was. Which {many} there?",
        "track": f"Start at the {clip.place} and follow its colour. Which {many} there?",
    }[clip.task]


def questions(clip: GazeClip, rng: np.random.Generator) -> tuple[list[Conversation], list[dict | None]]:
    """Return the clip's conversations and their probes: task, multiple-choice options, index of the right one, target cell of each frame.

    A caption has no probe. In `cell` clips, there is a question about every cell that has a digit in all frames; in other clips, about the
    path. Wrong options are digits of other cells, so knowing the digits without their places does not help.
    """
    if clip.task == "caption":
        return [[{"question": question(clip), "answer": caption(clip)}]], [None]
    paths = [clip.path]
    if clip.task == "cell":
        full = np.argwhere((clip.digits >= 0).all(0))
        paths = [np.repeat(cell[None], len(clip.digits), 0) for cell in full]
    conversations, probes = [], []
    for path in paths:
        asked = replace(clip, path=path)
        choices = _wrong(asked, rng)
        place = int(rng.integers(N_CHOICES))
        choices.insert(place, asked.answer)
        conversations.append([{"question": question(asked), "answer": asked.answer}])
        probes.append({"task": clip.task, "choices": choices, "answer_index": place, "cells": path.tolist()})
    return conversations, probes


def _wrong(clip: GazeClip, rng: np.random.Generator) -> list[str]:
    """Return wrong options: digits of other cells (for `cell`, of one cell through all frames), then random digits if there are too few."""
    grid = clip.digits.shape[-1]
    found: list[str] = []
    for place in rng.permutation(grid**2):
        row, column = divmod(int(place), grid)
        here = clip.digits[:, row, column]
        if clip.task != "cell":  # in each frame, any digit outside the target cell
            others = [frame[(frame >= 0) & ~_only(grid, cell)] for frame, cell in zip(clip.digits, clip.path, strict=True)]
            here = np.array([rng.choice(other) if len(other) else EMPTY for other in others])
        text = "".join(map(str, here))
        if (here >= 0).all() and text != clip.answer and text not in found:
            found.append(text)
    while len(found) < N_CHOICES - 1:
        invented = "".join(map(str, rng.integers(10, size=len(clip.digits))))
        if invented != clip.answer and invented not in found:
            found.append(invented)
    return found[: N_CHOICES - 1]


def _only(grid: int, cell: np.ndarray) -> np.ndarray:
    """True in one cell: bool [G, G]."""
    mask = np.zeros((grid, grid), bool)
    mask[*cell] = True
    return mask
