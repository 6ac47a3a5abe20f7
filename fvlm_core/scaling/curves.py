"""Training curves: the metrics of one run, or of consecutive runs that start from each other.

`python -m fvlm_core.scaling.curves job.yaml` draws those of a phase's runs.
"""

import re
from itertools import cycle
from pathlib import Path
from typing import Any

from fvlm_core.canvas import COLOURS, WIDTH, canvas
from fvlm_core.cli import run_job
from fvlm_core.manifest import file_entries
from fvlm_core.scaling.jobs import CurvesJob, CurvesManifest
from fvlm_core.scaling.runs import FinishedRun, metrics_rows

CURVES = "curves.png"
PASSES = "validation loss by pass"
"""This panel's columns depend on the passes of the run."""
PANELS = {
    "validation loss (nats/token)": ("val_loss",),
    "gradient norm": ("grad_norm_connector", "grad_norm_vision", "grad_norm_llm"),
    "learning rate": ("lr_connector", "lr_vision", "lr_llm"),
    "attention entropy (nats)": ("entropy",),
    "frames/s": ("frames_per_s",),
    PASSES: (),
}
"""Columns of `metrics.csv`, by panel."""
LINES: tuple[dict[str, Any], ...] = (
    {"color": COLOURS[0], "linestyle": "-", "linewidth": 5, "alpha": 0.4, "marker": "o", "markersize": 7},
    {"color": COLOURS[1], "linestyle": "-", "linewidth": 2.2, "marker": "s", "markersize": 4},
    {"color": "black", "linestyle": ":", "linewidth": 1.4, "marker": "x", "markersize": 5},
)
"""Line styles of a panel's columns: each is narrower than the one below it, so that coinciding curves stay visible."""
ALONE: dict[str, Any] = {"color": COLOURS[0], "marker": ".", "markersize": 5}


def plot_curves(stages: dict[str, FinishedRun], path: Path) -> bool:
    """Draw the metrics of the stages one after another over the steps. Returns False if no run has metrics."""
    series: dict[str, list[tuple[str, list[float], list[float]]]] = {panel: [] for panel in PANELS}
    borders, offset = [], 0
    for run in stages.values():
        rows = metrics_rows(run.folder)
        passes = [column for column in (rows[0] if rows else {}) if re.fullmatch(r"val_(coarse|fine\d+)", column)]
        for panel, columns in PANELS.items():
            for column in passes if panel == PASSES else columns:
                points = [(offset + int(row["step"]), float(row[column])) for row in rows if row.get(column)]
                if points:
                    steps, values = zip(*points, strict=True)
                    series[panel].append((column, list(steps), list(values)))
        offset += run.manifest.steps
        borders.append(offset)
    drawn = {panel: lines for panel, lines in series.items() if lines}
    if not drawn:
        return False
    with canvas(path, (WIDTH, 2.9 * ((len(drawn) + 1) // 2))) as figure:
        grid = figure.subplots((len(drawn) + 1) // 2, 2, squeeze=False).ravel()
        for axes, (panel, lines) in zip(grid, drawn.items(), strict=False):
            names = list(dict.fromkeys(column for column, _, _ in lines))
            styles = dict(zip(names, cycle(LINES), strict=False)) if len(names) > 1 else {names[0]: ALONE}
            for column, steps, values in lines:
                axes.plot(steps, values, **styles[column])
            for border in borders[:-1]:
                axes.axvline(border, color="#b8bfc7", linewidth=1, linestyle=":")
            if panel == "learning rate" and all(value > 0 for _, _, values in lines for value in values):
                axes.set_yscale("log")
            axes.set_title(panel)
            axes.set_xlabel("step (dotted: end of a stage)" if len(stages) > 1 else "step")
            if len(names) > 1:
                short = [name.removeprefix("grad_norm_").removeprefix("lr_").removeprefix("val_") for name in names]
                handles = [axes.plot([], [], **styles[name])[0] for name in names]
                axes.legend(handles, short)
        for axes in grid[len(drawn) :]:
            axes.set_axis_off()
    return True


def draw(job: CurvesJob) -> CurvesManifest:
    """Run the job: draw the curves of its runs one after another."""
    runs = {name: FinishedRun.read(folder) for name, folder in job.runs.items()}
    plot_curves(runs, job.output / CURVES)
    return CurvesManifest(
        name="curves",
        settings_hash=job.hash(exclude={"output", "runs"}),
        inputs={name: run.manifest.digest for name, run in runs.items()},
        counts={"runs": len(runs)},
        files=file_entries(job.output, [CURVES], identity=False),  # the curves include speeds
    ).write(job.output)


if __name__ == "__main__":
    run_job(CurvesJob, draw)
