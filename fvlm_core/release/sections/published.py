"""What others have published, to compare with."""

from fvlm_core.eval.references import references_table
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.report import Section


def section(evidence: Evidence, figures: Figures) -> Section:
    return Section(title="Published models", blocks=[references_table()])
