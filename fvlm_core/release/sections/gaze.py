"""Heat maps of where the model looks; drawn by the evaluation."""

from fvlm_core.figures import Figure
from fvlm_core.markdown import escape
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.report import Section

TITLE = "Where it looks"


def section(evidence: Evidence, figures: Figures) -> Section:
    results = evidence.results
    maps = [
        Figure(file=one.file, caption=f"{one.question} — {one.answer} ({one.source}, {one.key})", chart=False) for one in results.heatmaps
    ]
    if shown := figures.copy(evidence.job.evaluation, *maps):
        return Section(title=TITLE, blocks=[*shown])
    return Section(title=TITLE, missing=escape(results.absent.get("heatmaps", "no heat maps were drawn")))
