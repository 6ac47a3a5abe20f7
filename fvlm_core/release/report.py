"""The report as data (`report.json`) and as markdown (`report.md`); `html` renders the same markdown as a page."""

import re
from typing import Literal

from fvlm_core.figures import Figure
from fvlm_core.settings import Settings
from fvlm_core.tables import Table

Tone = Literal["good", "neutral", "bad"]
"""How the verdict is shown."""
Block = str | Table | Figure
"""Markdown (a paragraph, list or code block), a table, or a picture."""


class Section(Settings):
    """A section of the report."""

    title: str
    blocks: list[Block] = []
    missing: str = ""
    """Why there is nothing to show, e.g. `no ablations were run`."""

    @property
    def anchor(self) -> str:
        """The section's id in links."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")

    def markdown(self) -> str:
        """The section's body, without its title."""
        missing = [f"Missing: {self.missing}."] if self.missing else []
        return "\n\n".join([block if isinstance(block, str) else block.markdown() for block in self.blocks] + missing)


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

    @property
    def figures(self) -> dict[str, Figure]:
        """All pictures, by file."""
        return {block.file: block for section in self.sections for block in section.blocks if isinstance(block, Figure)}

    def markdown(self) -> str:
        """`report.md`."""
        tiles = Table(head=["", "value", ""], rows=[[tile.label, tile.value, tile.note] for tile in self.tiles])
        parts = [f"# {self.name}", self.subtitle, f"**{self.verdict}** {self.verdict_note}", tiles.markdown()]
        parts += [f"## {section.title}\n\n{section.markdown()}" for section in self.sections]
        return "\n\n".join(parts) + "\n"
