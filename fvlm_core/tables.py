"""Tables as data: built once, then rendered on a terminal, in markdown, in HTML, or as a UI artifact."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from pydantic import Field, JsonValue
from rich import markup
from rich.table import Table as RichTable

from fvlm_core.markdown import escape
from fvlm_core.settings import Settings

SIGNIFICANT_DIGITS = 4
"""Significant digits of floats in `text`."""
DIFFERENCE_DECIMALS, MOST_DECIMALS = 4, 7
"""Minimum and maximum number of decimals of a loss difference."""
_NUMBER = r"[+\-−~$]*\d[\d.,]*(e[+-]?\d+)?%?"
_UNIT = r"(ms|s|min|h|kB|MB|GB|FLOPs|samples/s|frames/s|nats|USD)"
NUMBER = re.compile(rf"{_NUMBER}( ?{_UNIT}( {_NUMBER} {_UNIT})?)?( \[{_NUMBER}, {_NUMBER}\]| at {_NUMBER})?[*†]*")
"""A number with an optional unit, interval, step and footnote mark; a sentence that begins with a digit does not match."""
NO_DIFFERENCE = "no difference"


class Interval(Protocol):
    """A value with its lower and upper bound."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


class Table(Settings):
    """Rows of formatted plain-text cells; the first column names the row."""

    title: str = ""
    head: list[str]
    rows: list[list[str]]
    marked: list[int] = Field(default_factory=list)
    """Indices of rows to highlight, such as a winner."""
    note: str = ""
    """Explanation of the numbers, one or two sentences of markdown."""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, JsonValue]], *, title: str = "", note: str = "") -> "Table":
        """A table of records: one column per key in order of appearance, floats rounded, missing values left empty."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        return cls(
            title=title, head=[words(name) for name in names], rows=[[text(row.get(name)) for name in names] for row in rows], note=note
        )

    @property
    def numeric(self) -> list[bool]:
        """Per column, whether all its cells are numbers (with or without an interval or unit); such columns are right-aligned."""
        columns = [[row[place] for row in self.rows if row[place]] for place in range(len(self.head))]
        return [place > 0 and bool(cells) and all(_is_number(cell) for cell in cells) for place, cells in enumerate(columns)]

    def markdown(self) -> str:
        """The table and its note in markdown. The title is left out: the caller writes it as a heading."""
        rows = [[escape(cell) for cell in row] for row in self.rows]
        stressed = [[f"**{cell}**" if cell and number in self.marked else cell for cell in row] for number, row in enumerate(rows)]
        rule = ["---:" if numeric else "---" for numeric in self.numeric]
        lines = [[escape(cell) for cell in self.head], rule, *stressed]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{table}\n\n{self.note}" if self.note else table

    def terminal(self) -> RichTable:
        """The table for a rich console."""
        shown = RichTable(
            title=self.title or None,
            title_justify="left",
            caption=markup.escape(self.note) or None,
            caption_justify="left",
            box=None,
            pad_edge=False,
            header_style="bold",
        )
        for name, numeric in zip(self.head, self.numeric, strict=True):
            shown.add_column(markup.escape(name), justify="right" if numeric else "left")
        for number, row in enumerate(self.rows):
            shown.add_row(*map(markup.escape, row), style="bold" if number in self.marked else None)
        return shown

    def records(self) -> list[dict[str, str]]:
        """One dict per row, the format of Prefect's table artifacts."""
        return [dict(zip(self.head, row, strict=True)) for row in self.rows]


def words(name: str) -> str:
    """A field name as readable words: `loss_fine1` -> `loss fine1`."""
    return name.replace("_", " ")


def text(value: JsonValue) -> str:
    """A value as readable text: floats with four significant digits, integers with thousands separators, empty for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{SIGNIFICANT_DIGITS}g}" if math.isfinite(value) else str(value)
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def number(value: Interval | float | None, decimals: int = 3) -> str:
    """Format a value, e.g. `0.512 [0.480, 0.541]`, or `0.512` without an interval; empty for None."""
    if value is None:
        return ""
    if isinstance(value, int | float):
        return f"{value:.{decimals}f}"
    return f"{value.value:.{decimals}f} [{value.low:.{decimals}f}, {value.high:.{decimals}f}]"


def difference(value: Interval) -> str:
    """Format a difference, e.g. `+0.0310 [+0.0280, +0.0343]`, with enough decimals to show it; `no difference` if all three are 0."""
    shown = value.value or max(abs(value.low), abs(value.high))
    if shown == 0:
        return NO_DIFFERENCE
    decimals = min(MOST_DECIMALS, decimals_for(shown))
    return f"{value.value:+.{decimals}f} [{value.low:+.{decimals}f}, {value.high:+.{decimals}f}]"


def signed(difference: float) -> str:
    """A signed difference with four decimals, or enough to show two significant digits, so that only 0 is shown as 0."""
    if difference == 0:
        return "0"
    decimals = decimals_for(difference)
    return f"{difference:+.{decimals}f}" if decimals <= MOST_DECIMALS else f"{difference:+.1e}"


def decimals_for(value: float, least: int = DIFFERENCE_DECIMALS) -> int:
    """Number of decimals that shows two significant digits of a nonzero number; at least `least`."""
    return max(least, 1 - math.floor(math.log10(abs(value))))


def _is_number(cell: str) -> bool:
    return cell == NO_DIFFERENCE or NUMBER.fullmatch(cell) is not None
