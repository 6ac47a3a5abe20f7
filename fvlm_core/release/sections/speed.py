"""Training speed: the variants that were tried, and their gains."""

from fvlm_core.markdown import escape
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.report import Block, Section
from fvlm_core.tables import Table
from fvlm_core.train.jobs import SpeedReport, SpeedRow

TITLE = "Speed"
ALWAYS = 2
"""The first columns, which are shown even if empty."""


def section(evidence: Evidence, figures: Figures) -> Section:
    found = evidence.report("speed", SpeedReport)
    if found is None:
        return Section(title=TITLE, missing="no speed work was done")
    report = found.manifest
    chosen = ", ".join(f"`{path}` = {escape(str(value))}" for path, value in report.chosen.items())
    advice = report.checkpoint
    blocks: list[Block] = [f"{report.summary()} Chosen: {chosen}.", *figures.copy(found.folder, *report.figures), speed_table(report.rows)]
    blocks.append(parts_table(report.parts))
    blocks.append(
        f"A checkpoint ({advice.bytes / 1e6:,.0f} MB) takes {advice.write_s:.1f} s to write here. If a machine fails every "
        f"{advice.hours_to_failure:.0f} h, one every {advice.steps:,} steps loses the least time (Young 1974, Daly 2006)."
    )
    return Section(title=TITLE, blocks=blocks)


def parts_table(parts: dict[str, dict[str, float]]) -> Table:
    """Share of each part in a step's time, naive and tuned."""
    rows = [[part, *(f"{shares.get(part, 0):.0%}" for shares in parts.values())] for part in next(iter(parts.values()))]
    return Table(
        title="Share of a step's time",
        head=["part", *parts],
        rows=rows,
        note="Forward by part; operations and traces are in the step's folder.",
    )


def speed_table(rows: list[SpeedRow]) -> Table:
    """A row per variant, without empty columns."""
    cells = [
        [
            row.variant,
            row.failure or f"{row.samples_per_s or 0:.1f}",
            f"{row.step_s:.3g} s" + (f" [{row.step_s_low:.3g}, {row.step_s_high:.3g}]" if row.step_s_low and row.step_s_high else "")
            if row.step_s
            else "",
            _gain(row),
            f"{row.frames_per_s:.1f}" if row.frames_per_s else "",
            f"{row.share_of_matmul:.1%}" if row.share_of_matmul else "",
            f"{row.mfu:.1%}" if row.mfu else "",
            f"{row.gpu_busy:.1%}" if row.gpu_busy else "",
            f"{row.power_w:.0f}" if row.power_w else "",
            str(row.sm_clock_mhz or ""),
            f"{row.peak_memory_gb:.2f}" if row.peak_memory_gb else "",
        ]
        for row in rows
    ]
    head = [
        "variant",
        "samples/s",
        "step [quartiles]",
        "gain [95 %]",
        "frames/s",
        "share of matmul",
        "MFU",
        "GPU busy",
        "W",
        "MHz",
        "peak GB",
    ]
    kept = [index for index in range(len(head)) if index < ALWAYS or any(row[index] for row in cells)]
    return Table(
        head=[head[index] for index in kept],
        rows=[[row[index] for index in kept] for row in cells],
        marked=[len(cells) - 1],
        note="Naive is an ordinary implementation: padding, full logits, eager mode, a plain loader, the recipe's batch and precision. "
        "Variants alternate step by step; a gain whose interval contains 1 is no gain. FLOPs count only necessary operations.",
    )


def _gain(row: SpeedRow) -> str:
    if row.gain is None or row.gain_low is None:
        return ""
    high = "" if row.gain_high is None else f"{row.gain_high:.2f}"
    return f"{row.gain:.2f} [{row.gain_low:.2f}, {high}] over {row.over}"
