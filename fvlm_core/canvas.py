"""The common style of all charts: a white background, and byte-identical files for identical inputs."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

COLOURS = ("#2f6fde", "#e07b39", "#2a9d6f", "#b0479a", "#8a6d3b", "#5b6770")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so it is the same everywhere
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "fvlm",  # makes the identifiers in SVG files deterministic
}
DPI = 130
WIDTH = 11
"""Inches; the same for all charts, so that text has the same size side by side."""


@contextmanager
def canvas(path: Path, size: tuple[float, float], *, vector: bool = False) -> Generator[Figure]:
    """Yield a figure of `size` (width, height) in inches and save it to `path` on exit; `vector` also saves an SVG beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        yield figure
        figure.savefig(path, metadata={"Software": None})  # matplotlib's version would change the bytes
        if vector:
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
