"""Render `report.html`: the report's markdown on one page, with styles and pictures inside the file.

The markdown contains untrusted text (answers of a model, names of clips, web addresses). So HTML in it is escaped, and only the report's
own pictures are shown.
"""

import base64
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

from fvlm_core.figures import Figure
from fvlm_core.release.report import Report

TEMPLATES = "templates"
INTERVAL = re.compile(r"([+-]?[\d.]+) (\[[^\]]+\])")
"""A number and its confidence interval, as `fvlm_core.eval.tables.number` writes them."""
LONG_CODE_LINES = 12
"""Code blocks with more lines are collapsed."""


def html(report: Report, folder: Path) -> str:
    """Return the page; pictures are read from `folder`."""
    environment = Environment(
        loader=PackageLoader("fvlm_core.release", TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    renderer = markdown_renderer(report.figures, folder)
    bodies = [renderer.render(section.markdown()) for section in report.sections]
    return environment.get_template("report.html.j2").render(report=report, sections=list(zip(report.sections, bodies, strict=True)))


def markdown_renderer(figures: dict[str, Figure], folder: Path) -> MarkdownIt:
    """A renderer of markdown with tables to HTML. Only the pictures in `figures` are shown; they are inlined."""
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(_self: RendererHTML, tokens: Sequence[Token], index: int, _options: OptionsDict, _env: EnvType) -> str:
        figure = figures.get(str(tokens[index].attrGet("src")))
        if figure is None:
            return escapeHtml(tokens[index].content)
        picture = base64.b64encode((folder / figure.file).read_bytes()).decode()
        kind, caption = "chart" if figure.chart else "photo", escapeHtml(figure.caption)
        return f'<span class="scroll"><img class="{kind}" src="data:image/png;base64,{picture}" alt="{caption}"></span>'

    renderer.core.ruler.push("report", _report_classes)
    renderer.add_render_rule("image", image)
    renderer.add_render_rule("fence", _fence)
    renderer.add_render_rule("table_open", lambda *_: '<div class="scroll" tabindex="0"><table>\n')
    renderer.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return renderer


def _report_classes(state: StateCore) -> None:
    """Set the CSS classes of numbers, intervals, highlighted rows, pictures, captions and notes."""
    tokens = state.tokens
    for place, token in enumerate(tokens):
        if token.type in ("th_open", "td_open") and "right" in str(token.attrs.pop("style", "")):
            token.attrSet("class", "number")
        if token.type == "tr_open" and _is_stressed(tokens[place + 2]):
            token.attrSet("class", "marked")
        if token.type == "inline" and tokens[place - 1].type == "td_open":
            _set_interval(token)
        if token.type == "paragraph_open":
            children, before = tokens[place + 1].children or [], tokens[max(0, place - 3) : place]
            if [child.type for child in children] == ["image"]:
                token.attrSet("class", "picture")
            elif before and (before[-1].type == "table_close" or before[0].attrGet("class") == "picture"):
                token.attrSet("class", "note")


def _is_stressed(cell: Token) -> bool:
    children = cell.children or []
    return bool(children) and any(child.type == "strong_open" for child in children[:2])


def _set_interval(cell: Token) -> None:
    """Mark up a number and its interval, so that the interval is small and may wrap to its own line."""
    for child in cell.children or []:
        if child.type == "text" and (parts := INTERVAL.fullmatch(child.content)):
            child.type = "html_inline"
            child.content = f'<span class="value">{parts[1]}</span> <span class="interval">{escapeHtml(parts[2])}</span>'


def _fence(_self: RendererHTML, tokens: Sequence[Token], index: int, _options: OptionsDict, _env: EnvType) -> str:
    code = f"<pre><code>{escapeHtml(tokens[index].content)}</code></pre>"
    lines = tokens[index].content.count("\n")
    return f"<details><summary>{lines} lines</summary>{code}</details>\n" if lines > LONG_CODE_LINES else f"{code}\n"
