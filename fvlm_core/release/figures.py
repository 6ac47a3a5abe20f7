"""Pictures of the report: training curves drawn for it, everything else copied from the phases that drew it."""

import shutil
from pathlib import Path

from fvlm_core.release.evidence import Evidence
from fvlm_core.scaling.curves import CURVES, plot_curves
from fvlm_core.scaling.jobs import ABLATIONS_PLOT, PLOTS
from fvlm_core.train.jobs import PLOT_FILE as SPEED_PLOT

FIGURES = "figures"


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
