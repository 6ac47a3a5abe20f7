"""Tables that parts of the evaluation share: one column per mode, paired differences, and the result table."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from fvlm_core.eval.estimates import Estimate, Metric, PairedTest
from fvlm_core.tables import Table, difference, number

AnyMode = TypeVar("AnyMode", bound=str)
BASELINES = (
    "Compare with: chance, which is guessing; no frames, the same model without frames; constant, the best single answer, position or "
    "caption given every time; uniform, attention spread evenly over the frame."
)
"""Explains the usual names in `Metric.baselines`."""
TESTED = (
    "p (Holm): sign-flip test by clip, adjusted over the rows; in brackets the number of questions that only the first mode answers "
    "correctly against the number that only the second does."
)
"""Explains the p-values of `paired_table`."""


def by_mode(
    title: str, what: str, modes: Sequence[AnyMode], rows: Mapping[str, Mapping[AnyMode, Estimate | float | None]], *, note: str = ""
) -> Table:
    """A table with one row per name and one column per mode; `what` is the heading of the first column."""
    return Table(
        title=title,
        head=[what, *modes],
        rows=[[name, *(number(values.get(mode)) for mode in modes)] for name, values in rows.items()],
        note=note,
    )


def paired_table(title: str, tests: Sequence[PairedTest]) -> Table:
    """Differences between modes on the same samples, with p-values where a test was made, and the questions in which the modes differ."""
    tested = any(test.p_value is not None for test in tests)
    head = ["difference", "value", *(["p (Holm)"] if tested else [])]
    rows = [[f"{test.a} - {test.b}", difference(test.difference), *([_p(test)] if tested else [])] for test in tests]
    return Table(title=title, head=head, rows=rows, note=TESTED if tested else "")


def headline_table(metrics: Sequence[Metric], *, compact: bool = False) -> Table:
    """The result table: one row per metric, one column per mode, and the baselines of each metric.

    `compact` is for a terminal: without intervals, and with each baseline on its own line.
    """
    modes = list(dict.fromkeys(mode for metric in metrics for mode in metric.values))

    def shown(value: Estimate | float | None, decimals: int) -> str:
        return number(value.value if compact and isinstance(value, Estimate) else value, decimals)

    rows = [
        [
            metric.name,
            *(shown(metric.values.get(mode), metric.decimals) for mode in modes),
            ("\n" if compact else ", ").join(f"{name} {shown(value, metric.decimals)}" for name, value in metric.baselines.items()),
        ]
        for metric in metrics
    ]
    return Table(title="The model in its modes", head=["metric", *modes, "compare with"], rows=rows, note=BASELINES)


def _p(test: PairedTest) -> str:
    return "" if test.p_value is None else f"{test.p_value:.3g} ({test.only_a} against {test.only_b})"
