"""The evaluation's results: the headline table, then a section for each part, whose content the part defines."""

from fvlm_core.eval.parts import RESULTS
from fvlm_core.eval.results import Results
from fvlm_core.eval.tables import headline_table
from fvlm_core.markdown import escape
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.report import Block, Section
from fvlm_core.tables import Table


def section(evidence: Evidence, figures: Figures) -> Section:
    table = headline_table(evidence.results.headline())
    return Section(title="Evaluation", blocks=[table, "In brackets: 95 % bootstrap interval over clips."])


def parts(evidence: Evidence, figures: Figures) -> list[Section]:
    """A section for each part of the evaluation: its tables and pictures, or why it was not measured."""
    sections = []
    for name, kind in RESULTS.items():
        if part := evidence.results.parts.get(name):
            blocks: list[Block] = []
            for table in part.tables():
                blocks += [table] if table.title == part.title else [f"### {escape(table.title)}", table]
            if blocks := [*blocks, *figures.copy(evidence.job.evaluation, *part.figures())]:
                sections.append(Section(title=part.title, blocks=blocks))
        elif name in evidence.results.absent:
            sections.append(Section(title=kind.title, missing=escape(evidence.results.absent[name])))
    return sections


def modes_table(results: Results) -> Table:
    """The headline table without times, which depend on the machine."""
    return headline_table([metric for part in results.parts.values() if not part.timing for metric in part.headline()])
