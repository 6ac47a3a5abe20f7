"""The report as data (`report.json`), and its two forms for reading: markdown, and one self-contained HTML file."""

import base64
import re
from pathlib import Path
from typing import Annotated, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from pydantic import Field

from fvlm_core.settings import Settings

TEMPLATES = "templates"
INTERVAL = re.compile(r"^([+-]?[\d.]+) (\[[^\]]+\])$")
"""A number and its interval, as `fvlm_core.eval.tables.number` writes them."""
NUMBER = re.compile(r"^[+-]?[\d.,]+")
LONGEST_NUMBER = 40
Tone = Literal["good", "neutral", "bad"]
"""How the verdict is shown."""


class Text(Settings):
    """A paragraph; `code` and **bold** are understood."""

    kind: Literal["text"] = "text"
    text: str


class Items(Settings):
    """A list of sentences."""

    kind: Literal["items"] = "items"
    items: list[str]


class Table(Settings):
    """A table; the first column names the row."""

    kind: Literal["table"] = "table"
    head: list[str]
    rows: list[list[str]]
    marked: list[int] = Field(default_factory=list)
    """Rows to stress, such as a winner."""
    note: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Per column, whether its cells are set as numbers."""
        columns = list(zip(*self.rows, strict=True))
        return [bool(number) and any(cells) and all(_is_numeric(cell) for cell in cells if cell) for number, cells in enumerate(columns)]


class Picture(Settings):
    """A PNG beside the report."""

    kind: Literal["picture"] = "picture"
    file: str
    """Relative to the report."""
    caption: str
    chart: bool = True
    """A drawing on white, not frames of a video: dark pages may invert it."""


class Code(Settings):
    """Commands or a file's text; `title` folds it away."""

    kind: Literal["code"] = "code"
    text: str
    title: str = ""


Block = Annotated[Text | Items | Table | Picture | Code, Field(discriminator="kind")]


class Section(Settings):
    """A part of the report."""

    title: str
    blocks: list[Block]

    @property
    def anchor(self) -> str:
        """Its name in links."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


class Tile(Settings):
    """A headline number."""

    label: str
    value: str
    note: str = ""


class Report(Settings):
    """`report.json`."""

    name: str
    subtitle: str
    verdict: str
    tone: Tone
    verdict_note: str
    tiles: list[Tile]
    sections: list[Section]


def markdown(report: Report) -> str:
    """`report.md`."""
    parts = [f"# {report.name}", report.subtitle, f"**{report.verdict}** {report.verdict_note}".strip()]
    if report.tiles:
        parts.append(_markdown_table(["", "", ""], [[tile.label, tile.value, tile.note] for tile in report.tiles]))
    for section in report.sections:
        parts.append(f"## {section.title}")
        parts.extend(_markdown_block(block) for block in section.blocks)
    return "\n\n".join(parts) + "\n"


def html(report: Report, folder: Path) -> str:
    """`report.html`: styles and pictures (read from `folder`) are inside the file."""
    environment = Environment(
        loader=PackageLoader("fvlm_core.release", TEMPLATES),
        autoescape=select_autoescape(default_for_string=True, default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = _inline
    environment.filters["embedded"] = lambda file: f"data:image/png;base64,{base64.b64encode((folder / file).read_bytes()).decode()}"
    return environment.get_template("report.html.j2").render(report=report)


def _markdown_block(block: Block) -> str:
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Items):
        return "\n".join(f"* {item}" for item in block.items)
    if isinstance(block, Picture):
        return f"![{block.caption}]({block.file})\n\n*{block.caption}*"
    if isinstance(block, Code):
        fenced = f"```\n{block.text.rstrip()}\n```"
        return f"<details><summary>{block.title}</summary>\n\n{fenced}\n\n</details>" if block.title else fenced
    rows = [[f"**{row[0]}**", *row[1:]] if number in block.marked else row for number, row in enumerate(block.rows)]
    table = _markdown_table(block.head, rows)
    return f"{table}\n\n{block.note}" if block.note else table


def _markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in line)} |" for line in lines)


def _inline(text: str) -> Markup:
    """Escaped text with `code` and **bold**; an interval after a number is set small, and may go to its own line."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    marked = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", marked)
    return Markup(INTERVAL.sub(r'<span class="value">\1</span> <span class="interval">\2</span>', marked))


def _is_numeric(cell: str) -> bool:
    """Whether a cell is a number, with or without an interval or a unit."""
    return bool(NUMBER.match(cell)) and len(cell) < LONGEST_NUMBER
