"""Escape plain text for markdown, so that the output of a model, a file or a web page is shown verbatim and not read as markup."""

import re

SPECIAL = re.compile(
    r"""[\\`*<~|]                        # code, emphasis, HTML, strike-through, a table's border
    | (?<![^\W_])_ | _(?![^\W_])         # an underscore inside a word is no emphasis
    | \](?=[(\[:])                       # the middle of a link or picture
    | &(?=\#?\w+;)                       # an entity
    | ^(?:\#{1,6}(?=\s|$) | > | [-+](?=[\s-]|$))   # a heading, quotation, list item or rule
    """,
    re.VERBOSE,
)
NUMBERED = re.compile(r"^(\d{1,9})([.)])(?=\s|$)")
"""The start of a numbered list item."""


def escape(text: str) -> str:
    """Escape `text` and put it on one line; valid anywhere in a paragraph, list item or table cell of markdown."""
    return NUMBERED.sub(r"\1\\\2", SPECIAL.sub(r"\\\g<0>", printable(text).strip()))


def printable(text: str) -> str:
    """Text on one line, with non-printable characters replaced by a dot: an untrained model may output anything."""
    return "".join(character if character.isprintable() else "·" for character in text)
