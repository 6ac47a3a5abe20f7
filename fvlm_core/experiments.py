"""The experiment log: what every run was to show, what it changed, what came out, and the verdict; negative results too."""

from collections.abc import Sequence

from fvlm_core.settings import Settings
from fvlm_core.tables import Table

LOG_FILE = "knowledge.md"
"""On the volume; the phases append to it."""


class Experiment(Settings):
    """An entry."""

    run: str
    hypothesis: str
    change: str
    result: str
    verdict: str


def log_table(experiments: Sequence[Experiment], *, title: str = "") -> Table:
    """A row per entry."""
    rows = [[one.run, one.hypothesis, one.change, one.result, one.verdict] for one in experiments]
    return Table(title=title, head=["run", "hypothesis", "change", "result", "verdict"], rows=rows)
