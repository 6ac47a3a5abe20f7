"""The common style of all charts: drawn on white, equal bytes for equal inputs."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

COLOURS = ("#2f6fde", "#e07b39", "#2a9d6f", "#b0479a", "#8a6d3b", "#5b6770")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # matplotlib's own: the same everywhere
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "fvlm",  # equal identifiers for equal pictures
}
DPI = 130
WIDTH = 11
"""Inches; the same for all, so that text is equally large side by side."""


@contextmanager
def canvas(path: Path, size: tuple[float, float], *, vector: bool = False) -> Generator[Figure]:
    """A figure of `size` inches in the common style, written to `path` at the end; with `vector` as SVG beside it, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        yield figure
        figure.savefig(path, metadata={"Software": None})  # no version in the file
        if vector:
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
