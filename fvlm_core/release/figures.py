"""Pictures of the report: training curves drawn here, everything else copied from the phases that drew it."""

import shutil
from pathlib import Path

from fvlm_core.release.evidence import Evidence
from fvlm_core.scaling.plots import COLOURS, WIDTH, canvas
from fvlm_core.scaling.reports import ABLATIONS_PLOT, PLOTS
from fvlm_core.scaling.runs import FinishedRun, metrics_rows
from fvlm_core.train.speed_job import PLOT_FILE as SPEED_PLOT

FIGURES = "figures"
CURVES = "curves.png"
PANELS = {
    "validation loss (nats/token)": ("val_loss",),
    "gradient norm": ("grad_norm_connector", "grad_norm_vision", "grad_norm_llm"),
    "learning rate": ("lr_connector", "lr_vision", "lr_llm"),
    "attention entropy (nats)": ("entropy",),
    "frames/s": ("frames_per_s",),
    "validation loss by pass": ("val_coarse", "val_fine1", "val_fine2"),
}
"""Columns of `metrics.csv` by panel."""


def copy_figures(evidence: Evidence, output: Path) -> dict[str, str]:
    """Put all pictures into `output/figures`; returns their paths relative to `output`, by name."""
    folder = output / FIGURES
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    folders = evidence.job.reports
    sources = {"speed": folders.speed and folders.speed / SPEED_PLOT, "ablations": folders.ablations and folders.ablations / ABLATIONS_PLOT}
    sources |= {Path(name).stem: folders.scaling and folders.scaling / name for name in PLOTS}
    sources |= {f"gaze-{number}": evidence.job.evaluation / one.file for number, one in enumerate(evidence.results.heatmaps)}
    copied = {}
    for name, source in sources.items():
        if source is not None and source.is_file():
            shutil.copyfile(source, folder / f"{name}.png")
            copied[name] = f"{FIGURES}/{name}.png"
    if plot_curves(evidence.stages or {"run": evidence.run}, folder / CURVES):
        copied["curves"] = f"{FIGURES}/{CURVES}"
    return copied


def plot_curves(stages: dict[str, FinishedRun], path: Path) -> bool:
    """The stages' metrics one after another over their steps; False where no run has any."""
    series: dict[str, list[tuple[str, list[float], list[float]]]] = {panel: [] for panel in PANELS}
    borders, offset = [], 0
    for run in stages.values():
        rows = metrics_rows(run.folder)
        for panel, columns in PANELS.items():
            for column in columns:
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
            for column, steps, values in lines:
                axes.plot(steps, values, color=COLOURS[names.index(column)], marker=".", markersize=4)
            for border in borders[:-1]:
                axes.axvline(border, color="#b8bfc7", linewidth=1, linestyle=":")
            if panel == "learning rate" and all(value > 0 for _, _, values in lines for value in values):
                axes.set_yscale("log")
            axes.set_title(panel)
            axes.set_xlabel("step (dotted: end of a stage)" if len(stages) > 1 else "step")
            if len(names) > 1:
                short = [name.removeprefix("grad_norm_").removeprefix("lr_").removeprefix("val_") for name in names]
                handles = [axes.plot([], [], color=COLOURS[index])[0] for index in range(len(names))]
                axes.legend(handles, short)
        for axes in grid[len(drawn) :]:
            axes.set_axis_off()
    return True
