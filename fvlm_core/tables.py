"""A table as data: built once, then shown on a terminal, in markdown, in HTML, or as an artifact of the UI."""

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
"""Of numbers that a table rounds by itself."""
DIFFERENCE_DECIMALS, MOST_DECIMALS = 4, 7
"""Of a difference of losses."""
_NUMBER = r"[+\-−~$]*\d[\d.,]*(e[+-]?\d+)?%?"
_UNIT = r"(ms|s|min|h|kB|MB|GB|FLOPs|samples/s|frames/s|nats|USD)"
NUMBER = re.compile(rf"{_NUMBER}( ?{_UNIT}( {_NUMBER} {_UNIT})?)?( \[{_NUMBER}, {_NUMBER}\]| at {_NUMBER})?[*†]*")
"""A number, with or without a unit, an interval, a step or a mark; a sentence that begins with a digit is none."""
NO_DIFFERENCE = "no difference"


class Interval(Protocol):
    """A number and the bounds it lies in."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


class Table(Settings):
    """Rows of cells that are ready to be read, in plain text; the first column names the row."""

    title: str = ""
    head: list[str]
    rows: list[list[str]]
    marked: list[int] = Field(default_factory=list)
    """Rows to stress, such as a winner."""
    note: str = ""
    """What the numbers are, in one or two sentences of markdown."""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, JsonValue]], *, title: str = "", note: str = "") -> "Table":
        """A table of records: a column per key in order of appearance, numbers rounded, what a record lacks left empty."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        return cls(
            title=title, head=[words(name) for name in names], rows=[[text(row.get(name)) for name in names] for row in rows], note=note
        )

    @property
    def numeric(self) -> list[bool]:
        """Per column, whether all its cells are numbers (with or without an interval or unit): set flush right."""
        columns = [[row[place] for row in self.rows if row[place]] for place in range(len(self.head))]
        return [place > 0 and bool(cells) and all(_is_number(cell) for cell in cells) for place, cells in enumerate(columns)]

    def markdown(self) -> str:
        """The table in markdown, with its note; without its title, which is the caller's heading."""
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
        """A dict per row, as Prefect's table artifacts want them."""
        return [dict(zip(self.head, row, strict=True)) for row in self.rows]


def words(name: str) -> str:
    """A field's name for a person: `loss_fine1` -> `loss fine1`."""
    return name.replace("_", " ")


def text(value: JsonValue) -> str:
    """A value for a person: numbers with four significant digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{SIGNIFICANT_DIGITS}g}" if math.isfinite(value) else str(value)
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def number(value: Interval | float | None, decimals: int = 3) -> str:
    """E.g. `0.512 [0.480, 0.541]`, or `0.512` where there is no interval; empty for None."""
    if value is None:
        return ""
    if isinstance(value, int | float):
        return f"{value:.{decimals}f}"
    return f"{value.value:.{decimals}f} [{value.low:.{decimals}f}, {value.high:.{decimals}f}]"


def difference(value: Interval) -> str:
    """E.g. `+0.0310 [+0.0280, +0.0343]`, with as many decimals as it takes to see it; `no difference` where nothing differs at all."""
    shown = value.value or max(abs(value.low), abs(value.high))
    if shown == 0:
        return NO_DIFFERENCE
    decimals = min(MOST_DECIMALS, decimals_for(shown))
    return f"{value.value:+.{decimals}f} [{value.low:+.{decimals}f}, {value.high:+.{decimals}f}]"


def signed(difference: float) -> str:
    """A difference with its sign and four decimals, or as many as two digits of it take: only 0 reads as 0."""
    if difference == 0:
        return "0"
    decimals = decimals_for(difference)
    return f"{difference:+.{decimals}f}" if decimals <= MOST_DECIMALS else f"{difference:+.1e}"


def decimals_for(value: float, least: int = DIFFERENCE_DECIMALS) -> int:
    """Decimals that show two digits of a number other than 0, but no fewer than `least`."""
    return max(least, 1 - math.floor(math.log10(abs(value))))


def _is_number(cell: str) -> bool:
    return cell == NO_DIFFERENCE or NUMBER.fullmatch(cell) is not None
