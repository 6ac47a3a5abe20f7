"""The experiment log: every run with its hypothesis, change, result and verdict, as the phases wrote it."""

from fvlm_core.experiments import LOG_FILE, log_table
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.report import Block, Section

TITLE = "Experiment log"


def section(evidence: Evidence, figures: Figures) -> Section:
    logs = {name: phase.experiments for name, phase in evidence.phases.items() if phase.experiments}
    if not logs:
        return Section(title=TITLE, missing="no phase has written any")
    blocks: list[Block] = [f"As in `{LOG_FILE}` on the volume, which earlier runs are in, too."]
    return Section(title=TITLE, blocks=[*blocks, *(log_table(entries, title=name) for name, entries in logs.items())])
