"""A draft of a blog post, `blog.md`, from the report's data."""

from jinja2 import Environment, PackageLoader, StrictUndefined

from fvlm_core.figures import Figure
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.formatting import duration, fenced
from fvlm_core.release.html import TEMPLATES
from fvlm_core.release.report import Report, Section
from fvlm_core.release.sections.ablations import TITLE as ABLATIONS
from fvlm_core.release.sections.evaluation import modes_table
from fvlm_core.release.sections.limitations import limitations
from fvlm_core.release.sections.reproduce import commands


def blog(evidence: Evidence, report: Report) -> str:
    """Return the post in markdown; it links to the report's pictures."""
    sections = {section.title: section for section in report.sections}
    results, job = evidence.results, evidence.job
    seconds = sum(phase.seconds for phase in evidence.phases.values())
    environment = Environment(loader=PackageLoader("fvlm_core.release", TEMPLATES), undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("blog.md.j2").render(
        name=job.name,
        repository=job.push_to or f"path/to/{job.name}",
        per_frame=results.tokens_per_frame,
        looks=results.looks,
        picture=next((figure.markdown() for figure in report.figures.values() if not figure.chart), None),
        verdict=report.verdict,
        verdict_note=report.verdict_note,
        modes=modes_table(results).markdown(),
        ablations=_shown(sections.get(ABLATIONS)),
        params=evidence.run.manifest.params,
        frames=f"{sum(stage.manifest.frames_seen for stage in evidence.stages.values()):,}",
        cost=f"The complete pipeline ran for {duration(seconds)}." if seconds else "",
        data=_shown(sections.get("Data")),
        limitations=limitations(evidence),
        reproduce=fenced("\n".join(commands(job)), "sh"),
        checkpoint=results.checkpoint,
    )


def _shown(section: Section | None) -> str:
    """A section's markdown without its pictures; empty if the section is missing."""
    if section is None or section.missing:
        return ""
    return "\n\n".join(block if isinstance(block, str) else block.markdown() for block in section.blocks if not isinstance(block, Figure))
