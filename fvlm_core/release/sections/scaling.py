"""The scaling grid: losses, fits with confidence intervals, undetermined quantities, and the chosen size."""

from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.formatting import items
from fvlm_core.release.report import Block, Section
from fvlm_core.scaling.jobs import FITS_FILE, ScalingReport
from fvlm_core.scaling.results import Fits
from fvlm_core.scaling.tables import fits_table, losses_table, undetermined

TITLE = "Scaling"


def section(evidence: Evidence, figures: Figures) -> Section:
    found = evidence.report("scaling", ScalingReport)
    if found is None:
        return Section(title=TITLE, missing="no scaling grid was run")
    report, fits = found.manifest, Fits.from_yaml(found.folder / FITS_FILE)  # JSON is YAML
    blocks: list[Block] = [f"Best size by the fits: **{report.chosen}**, by the {report.chosen_reason}.", losses_table(report.points)]
    blocks += figures.copy(found.folder, *report.figures)
    if reasons := undetermined(fits):
        blocks.append("What these runs do not determine:")
        blocks.append(items([f"{'; '.join(names)}: **{reason}**" for reason, names in reasons.items()]))
    if (table := fits_table(fits)).rows:
        blocks.append(table)
    return Section(title=TITLE, blocks=blocks)
