"""The experiment log: the hypothesis, change, result and verdict of every run, negative results included."""

from collections.abc import Sequence

from fvlm_core.settings import Settings
from fvlm_core.tables import Table

LOG_FILE = "knowledge.md"
"""File on the volume that the phases append to."""


class Experiment(Settings):
    """An entry of the log."""

    run: str
    hypothesis: str
    change: str
    result: str
    verdict: str


def log_table(experiments: Sequence[Experiment], *, title: str = "") -> Table:
    """A table with one row per entry."""
    rows = [[one.run, one.hypothesis, one.change, one.result, one.verdict] for one in experiments]
    return Table(title=title, head=["run", "hypothesis", "change", "result", "verdict"], rows=rows)
