"""The experiment log that the phases wrote: every run's hypothesis, change, result and verdict."""

from fvlm_core.experiments import LOG_FILE, log_table
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.report import Block, Section

TITLE = "Experiment log"


def section(evidence: Evidence, figures: Figures) -> Section:
    logs = {name: phase.experiments for name, phase in evidence.phases.items() if phase.experiments}
    if not logs:
        return Section(title=TITLE, missing="no phase has written an entry")
    blocks: list[Block] = [f"The entries of this release's phases; `{LOG_FILE}` on the volume also has those of earlier runs."]
    return Section(title=TITLE, blocks=[*blocks, *(log_table(entries, title=name) for name, entries in logs.items())])
