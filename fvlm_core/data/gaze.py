"""The generated benchmark of gaze: real handwritten digits on a 3x3 grid, all redrawn in every frame.

One token per frame cannot hold nine digits, so a question about one cell separates a model that looks where it is asked
from one that sees the frame as a whole. The digits are scikit-learn's bundled set; those of the validation split are never
drawn in training. Everything is a pure function of the generator passed in.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from fvlm_core.data.rows import Split

GRID = 3
"""Cells per side."""
CELL_PX = 14
"""Side of a cell at scale 1: one patch of DINOv2."""
FRAME_PX = GRID * CELL_PX
DIGIT_PX = 12
"""Side of a digit at scale 1; it moves by at most a pixel in its cell."""
EMPTY = -1
"""In place of a digit where a cell is empty."""
VAL_DIGITS = 397
"""Digits held out of training, of 1797."""
N_CHOICES = 4
"""Options of a multiple-choice question."""
COLOURS = {
    "red": (255, 40, 40),
    "green": (40, 220, 40),
    "blue": (80, 110, 255),
    "yellow": (250, 230, 40),
    "pink": (255, 90, 220),
    "white": (245, 245, 245),
}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
CENTRE = (1, 1)

Conversation = list[dict[str, str]]
"""Turns, each `{"question", "answer"}`."""


@dataclass(frozen=True)
class GazeClip:
    """A rendered clip and what is on it."""

    frames: np.ndarray
    """uint8 [T, S, S, 3], one frame per second."""
    digits: np.ndarray
    """int [T, 3, 3]: the digit in each cell, or EMPTY."""
    colours: np.ndarray
    """int [T, 3, 3]: index into COLOURS."""


def render(rng: np.random.Generator, split: Split, *, frames: int, scale: int = 1, clutter: float = 1.0, noise: float = 0.05) -> GazeClip:
    """Draw a clip of `frames` frames at `scale` times 42 px.

    One cell (the centre for half of the clips) has a digit in every frame; each other cell has one with probability
    `clutter`. `noise` is the standard deviation of the dark background, as a share of full brightness.
    """
    images, labels = digits_of(split, DIGIT_PX * scale)
    target = CENTRE if rng.random() < 0.5 else tuple(rng.integers(GRID, size=2))
    present = rng.random((frames, GRID, GRID)) < clutter
    present[:, target[0], target[1]] = True
    chosen = rng.integers(len(labels), size=(frames, GRID, GRID))
    colours = rng.integers(len(COLOURS), size=(frames, GRID, GRID))
    jitter = rng.integers(-scale, scale + 1, size=(frames, GRID, GRID, 2))
    background = np.clip(np.abs(rng.normal(0, 255 * noise, (frames, FRAME_PX, FRAME_PX, 3))), 0, 255).astype(np.uint8)
    pixels = background.repeat(scale, axis=1).repeat(scale, axis=2)
    palette = np.array(list(COLOURS.values()), np.uint16)
    size, margin = DIGIT_PX * scale, (CELL_PX - DIGIT_PX) // 2 * scale
    for t, row, column in np.argwhere(present):
        y, x = jitter[t, row, column] + (row * CELL_PX * scale + margin, column * CELL_PX * scale + margin)
        here = pixels[t, y : y + size, x : x + size]
        np.maximum(here, (images[chosen[t, row, column], ..., None] * palette[colours[t, row, column]] // 255).astype(np.uint8), out=here)
    return GazeClip(pixels, np.where(present, labels[chosen], EMPTY), colours)


@lru_cache(maxsize=4)
def digits_of(split: Split, size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """The split's digits: brightness uint16 [N, size_px, size_px] in 0..255 (room for a product with a colour) and labels int [N]."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))  # the set is sorted by writer; this split is fixed for ever
    chosen = order[-VAL_DIGITS:] if split == "val" else order[:-VAL_DIGITS]
    bright = (np.asarray(pixels)[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    scaled = [np.asarray(Image.fromarray(image).resize((size_px, size_px), Image.Resampling.BILINEAR)) for image in bright]
    return np.stack(scaled).astype(np.uint16), np.asarray(labels)[chosen]


def caption(clip: GazeClip) -> str:
    """What a cell with a digit in every frame shows, e.g. `371 at the top left`: the centre where it has, else the first."""
    full = (clip.digits != EMPTY).all(0)
    row, column = CENTRE if full[CENTRE] else np.argwhere(full)[0].tolist()
    return f"{''.join(map(str, clip.digits[:, row, column]))} at the {cell_name(row, column)}"


def reading(clip: GazeClip) -> str:
    """All cells of the first frame, row by row, e.g. `371 205 998`; `-` where a cell is empty."""
    return " ".join("".join("-" if digit == EMPTY else str(digit) for digit in row) for row in clip.digits[0])


def cell_name(row: int, column: int) -> str:
    """E.g. `top left`."""
    return f"{ROWS[row]} {COLUMNS[column]}"


def cell_questions(clip: GazeClip, rng: np.random.Generator) -> tuple[list[Conversation], list[dict]]:
    """A question per cell that has a digit in every frame: which digits are there, in order, one character a frame.

    Returns the conversations and their probes: the task, multiple-choice options (the wrong ones are what other cells show, so
    knowing the digits without their places does not help), the right option's index, and the cell to look at in each frame.
    """
    sequences = {
        (row, column): "".join(map(str, clip.digits[:, row, column]))
        for row in range(GRID)
        for column in range(GRID)
        if (clip.digits[:, row, column] != EMPTY).all()
    }
    many = "digits are" if len(clip.digits) > 1 else "digit is"
    conversations, probes = [], []
    for cell, answer in sequences.items():
        wrong = list(dict.fromkeys(text for text in sequences.values() if text != answer))
        wrong = [wrong[index] for index in rng.permutation(len(wrong))]
        while len(wrong) < N_CHOICES - 1:
            invented = "".join(map(str, rng.integers(10, size=len(answer))))
            if invented != answer and invented not in wrong:
                wrong.append(invented)
        choices = wrong[: N_CHOICES - 1]
        place = int(rng.integers(N_CHOICES))
        choices.insert(place, answer)
        conversations.append([{"question": f"Which {many} at the {cell_name(*cell)}?", "answer": answer}])
        probes.append({"task": "cell", "choices": choices, "answer_index": place, "cells": [list(cell)] * len(clip.digits)})
    return conversations, probes
