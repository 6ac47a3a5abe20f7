"""Training curves and results of every stage."""

from fvlm_core.figures import Figure
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import FOLDER, Figures
from fvlm_core.release.formatting import duration
from fvlm_core.release.report import Block, Section
from fvlm_core.tables import Table

FILE = "curves.png"
CAPTION = "Training curves of all stages. Where curves coincide, the thin one is drawn over the thick one."


def section(evidence: Evidence, figures: Figures) -> Section:
    from fvlm_core.scaling.curves import plot_curves  # imported here: nothing else in a report needs matplotlib

    rows = [
        [
            name,
            f"{run.manifest.steps:,}",
            f"{run.manifest.samples_seen:,}",
            f"{run.manifest.frames_seen:,}",
            f"{run.manifest.flops:.2e}",
            duration(run.manifest.seconds),
            f"{run.manifest.model_step:,}",
            f"{run.manifest.final_loss:.4f}",
            "none" if run.manifest.best_loss is None else f"{run.manifest.best_loss:.4f} at {run.manifest.best_step:,}",
            ", ".join(map(str, run.manifest.resumed_from)) or "no",
        ]
        for name, run in evidence.stages.items()
    ]
    blocks: list[Block] = []
    if plot_curves(evidence.stages, figures.place(FILE)):
        blocks.append(Figure(file=f"{FOLDER}/{FILE}", caption=CAPTION))
    head = ["stage", "steps", "samples", "frames", "FLOPs", "machine time", "model of step", "its loss", "best score", "resumed at"]
    return Section(title="Training curves", blocks=[*blocks, Table(head=head, rows=rows)])
