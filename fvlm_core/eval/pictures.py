"""Heat maps of the model's attention, drawn over the frames. Identical inputs give identical files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fvlm_core.data.gaze import GRID

MAX_COLUMNS = 8
"""Maximum number of frames drawn; of a longer clip, evenly spaced ones."""
CELL_INCHES, LABEL_INCHES, SCALE_INCHES = 1.5, 1.7, 0.6
DPI = 100
HEAT_COLOUR = (1.0, 0.45, 0.0)
HEAT_OPACITY, SHADE_OPACITY = 0.35, 0.75
"""Opacity of the tint at the peak of attention, and of the shade where there is no attention."""
SCALE_STEPS = 64
TITLE_CHARACTERS_PER_INCH, LABEL_CHARACTERS_PER_INCH = 11, 14


@dataclass(frozen=True)
class HeatRow:
    """One row of a picture: the frames of a clip, and the attention over them."""

    label: str
    frames: np.ndarray
    """uint8 [T, H, W, 3], in the order shown."""
    attention: np.ndarray | None
    """[T, rows, columns]; None draws the bare frames."""
    cells: list[tuple[int, int]] | None = None
    """Row and column of the asked cell of each frame, which is outlined."""


def draw(path: Path, rows: Sequence[HeatRow], title: str) -> None:
    """Write a grid of frames as PNG, one row per `HeatRow`."""
    columns = min(MAX_COLUMNS, max(len(row.frames) for row in rows))
    width = LABEL_INCHES + columns * CELL_INCHES
    heading = fill(title, int(width * TITLE_CHARACTERS_PER_INCH))
    title_inches = 0.25 + 0.2 * (heading.count("\n") + 1)
    scale_inches = SCALE_INCHES if any(row.attention is not None for row in rows) else 0.0
    height = title_inches + len(rows) * CELL_INCHES + scale_inches
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):  # ships with matplotlib, so it is the same everywhere
        figure = Figure(figsize=(width, height), dpi=DPI)
        figure.text(0.01, 1 - 0.1 / height, heading, va="top", fontsize=10, parse_math=False)
        for number, row in enumerate(rows):
            top = 1 - (title_inches + number * CELL_INCHES) / height
            label = fill(row.label, int(LABEL_INCHES * LABEL_CHARACTERS_PER_INCH))
            figure.text(0.01, top - CELL_INCHES / height / 2, label, va="center", fontsize=8, parse_math=False)  # $ is no math mode
            picked = np.unique(np.linspace(0, len(row.frames) - 1, columns).round().astype(int))
            for column, t in enumerate(picked):
                left = (LABEL_INCHES + column * CELL_INCHES) / width
                box = (left, top - CELL_INCHES / height, 0.94 * CELL_INCHES / width, 0.94 * CELL_INCHES / height)
                _frame(figure.add_axes(box), row, int(t))
        if scale_inches:
            _scale(figure.add_axes((LABEL_INCHES / width, 0.34 / height, 0.94 * CELL_INCHES / width, 0.12 / height)))
        figure.savefig(path, metadata={"Software": None})  # matplotlib's version would change the bytes


def _frame(axes: Any, row: HeatRow, t: int) -> None:
    side_y, side_x = row.frames.shape[1:3]
    extent = (0, side_x, side_y, 0)
    axes.imshow(row.frames[t], extent=extent, interpolation="nearest")
    if row.attention is not None:
        _tint(axes, row.attention[t] / row.attention[t].max(), extent)
    if row.cells:
        r, c = row.cells[t]
        place = (c * side_x / GRID, r * side_y / GRID)
        axes.add_patch(Rectangle(place, side_x / GRID, side_y / GRID, fill=False, edgecolor="#40e0ff", linewidth=2))
    axes.text(0.03, 0.96, str(t), transform=axes.transAxes, color="white", va="top", fontsize=8)
    axes.set_axis_off()


def _tint(axes: Any, weight: np.ndarray, extent: tuple[float, float, float, float]) -> None:
    """Overlay the heat colour and the shade according to a weight [rows, columns] in 0..1."""
    for colour, opacity in (((0.0, 0.0, 0.0), SHADE_OPACITY * (1 - weight)), (HEAT_COLOUR, HEAT_OPACITY * weight)):
        tint = np.concatenate([np.broadcast_to(colour, (*weight.shape, 3)), opacity[..., None]], -1)
        axes.imshow(tint, extent=extent, interpolation="nearest", aspect="auto")


def _scale(axes: Any) -> None:
    """Draw the colour scale from no attention to a frame's peak, over mid grey."""
    extent = (0.0, 1.0, 0.0, 1.0)
    axes.imshow(np.full((1, 1, 3), 0.5), extent=extent, aspect="auto")
    _tint(axes, np.linspace(0, 1, SCALE_STEPS)[None], extent)
    axes.set(xticks=[0, 1], yticks=[])
    axes.set_xticklabels(["0", "peak"], fontsize=7)
    axes.tick_params(length=2, pad=1)
    axes.set_xlabel("attention, per frame", fontsize=7, labelpad=0)
