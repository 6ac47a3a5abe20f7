"""Text that nobody vouches for stays text, in a paragraph and in a table."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from fvlm_core.figures import Figure
from fvlm_core.markdown import escape, printable
from fvlm_core.tables import Table

GITHUB = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
"""A reader that takes HTML as it comes."""
MARKUP = st.text("ab1 *_`~<>[]()!|\\&#;:/.-+\"'\n$", max_size=24)


def shown(html: str) -> str:
    """The text of rendered markdown; fails for any element but those of the paragraph or table around it."""
    assert set(re.findall(r"<(\w+)", html)) <= {"p", "table", "thead", "tbody", "tr", "th", "td", "em", "strong"}, html
    text = re.sub(r"<[^>]*>", "", html)
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        text = text.replace(entity, character)
    return text.strip()


@given(MARKUP | st.text(max_size=12))
@example("<script>alert(1)</script>")
@example("![x](javascript:alert(1))")
@example("[a]: http://b")
@example("&lt;b&gt;")
@example("a\\|b")
@example("- - -")
@example("1. one")
@example("# no heading")
@example("__init__ and snake_case")
def test_any_text_comes_back_as_it_was(text: str) -> None:
    plain = printable(text).strip()
    assert shown(GITHUB.render(escape(text))) == plain
    table = Table(head=["what", "said"], rows=[["it", text]]).markdown()
    assert shown(GITHUB.render(table)).removeprefix("what").split("it", 1)[1].strip() == plain


def test_words_and_numbers_need_no_escape() -> None:
    for text in ("loss_fine1", "0.512 [0.480, 0.541]", "-0.5000", "data.mixture = gaze_caption 86%, text 14%", "2.3e+10", "5 - 3"):
        assert escape(text) == text


@pytest.mark.parametrize("caption", ["a ] b", "[x](y) — <b>z</b>", "ends with a star*"])
def test_a_figure_is_one_picture_with_its_caption(caption: str) -> None:
    html = GITHUB.render(Figure(file="figures/a.png", caption=caption).markdown())
    assert re.findall(r'<img src="([^"]*)"', html) == ["figures/a.png"]
    assert shown(re.sub(r"<img[^>]*>", "", html)) == caption
