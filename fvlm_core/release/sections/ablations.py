"""All runs that differ from the base recipe in one setting, including those that are worse."""

from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.report import Section
from fvlm_core.scaling.jobs import AblationReport, Confirmation
from fvlm_core.scaling.tables import ablations_summary, ablations_table

TITLE = "Ablations"


def section(evidence: Evidence, figures: Figures) -> Section:
    found = evidence.report("ablations", AblationReport)
    if found is None:
        return Section(title=TITLE, missing="no ablations were run")
    report = found.manifest
    pictures = figures.copy(found.folder, *report.figures)
    confirmation = evidence.report("confirmation", Confirmation)
    again = [confirmation.manifest.text] if confirmation and confirmation.manifest.text else []
    return Section(title=TITLE, blocks=[ablations_summary(report), *again, *pictures, ablations_table(report)])
