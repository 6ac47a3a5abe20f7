"""What was tried to make training faster, and what it brought."""

from fvlm_core.markdown import escape
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.report import Section
from fvlm_core.tables import Table
from fvlm_core.train.jobs import SpeedReport, SpeedRow

TITLE = "Speed"
ALWAYS = 2
"""Columns that are shown even where they are empty."""


def section(evidence: Evidence, figures: Figures) -> Section:
    found = evidence.report("speed", SpeedReport)
    if found is None:
        return Section(title=TITLE, missing="no speed work was done")
    report = found.manifest
    chosen = ", ".join(f"`{path}` = {escape(str(value))}" for path, value in report.chosen.items())
    before = f"{report.naive_samples_per_s:.1f} to {report.tuned_samples_per_s:.1f} samples/s"
    text = f"**{report.speedup:.1f} times** faster than a plain loop ({before}) on {escape(report.device)}. Chosen: {chosen}."
    return Section(title=TITLE, blocks=[text, *figures.copy(found.folder, *report.figures), speed_table(report.rows)])


def speed_table(rows: list[SpeedRow]) -> Table:
    """A row per variant; without columns that no variant has."""
    cells = [
        [
            row.variant,
            row.failure or f"{row.samples_per_s or 0:.1f}",
            f"{row.frames_per_s:.1f}" if row.frames_per_s else "",
            f"{row.share_of_matmul:.1%}" if row.share_of_matmul else "",
            f"{row.mfu:.1%}" if row.mfu else "",
            f"{row.gpu_busy:.1%}" if row.gpu_busy else "",
            f"{row.peak_memory_gb:.2f}" if row.peak_memory_gb else "",
        ]
        for row in rows
    ]
    head = ["variant", "samples/s", "frames/s", "share of matmul", "MFU", "GPU busy", "peak GB"]
    kept = [index for index in range(len(head)) if index < ALWAYS or any(row[index] for row in cells)]
    return Table(
        head=[head[index] for index in kept],
        rows=[[row[index] for index in kept] for row in cells],
        marked=[len(cells) - 1],
        note="The naive variant is first, the tuned one last.",
    )
