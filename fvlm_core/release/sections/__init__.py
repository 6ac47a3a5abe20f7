"""The report's sections, one per file: `section(evidence, figures)` returns the title and content, or says what is missing.

To show the report of a new phase, add a file here and a line to `SECTIONS`; `Evidence.report` finds a step by the name of its manifest.
"""

from collections.abc import Callable

from fvlm_core.eval.summary import verdict
from fvlm_core.release import headline
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.report import Report, Section
from fvlm_core.release.sections import (
    ablations,
    cost,
    curves,
    data,
    evaluation,
    experiments,
    limitations,
    provenance,
    published,
    reproduce,
    scaling,
    selectors,
    speed,
)

SECTIONS: tuple[Callable[[Evidence, Figures], Section], ...] = (
    curves.section,
    ablations.section,
    scaling.section,
    speed.section,
    data.section,
    cost.section,
    experiments.section,
    selectors.section,
    limitations.section,
    published.section,
    provenance.section,
    reproduce.section,
)
"""In the order of the report, after the evaluation's sections."""


def build(evidence: Evidence, figures: Figures) -> Report:
    """Build the complete report; its pictures are written to `figures`."""
    found = verdict(evidence.results)
    job, per_frame = evidence.job, evidence.results.tokens_per_frame
    profile = f"profile {job.profile}, " if job.profile else ""
    subtitle = f"Report of a release: {profile}{evidence.run.manifest.params:,} parameters, "
    return Report(
        name=job.name,
        subtitle=subtitle + f"{per_frame} visual token{'s' if per_frame > 1 else ''} per frame",
        verdict=found.text,
        tone=found.tone,
        verdict_note=found.note,
        tiles=headline.tiles(evidence),
        sections=[
            evaluation.section(evidence, figures),
            *evaluation.parts(evidence, figures),
            *(section(evidence, figures) for section in SECTIONS),
        ],
    )
