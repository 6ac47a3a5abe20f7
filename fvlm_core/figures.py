"""A picture with what is to be seen in it: a step names its own, and report, card and artifacts show them."""

import re

from fvlm_core.markdown import escape
from fvlm_core.settings import Settings

UNESCAPED_BRACKET = re.compile(r"(?<!\\)[\[\]]")


class Figure(Settings):
    """A PNG."""

    file: str
    """Relative to the folder of whatever holds the figure: a step's result, or a report."""
    caption: str
    """Plain text, a sentence."""
    chart: bool = True
    """A drawing on white, which dark pages may invert; otherwise frames of a video."""

    def markdown(self) -> str:
        """The picture, and its caption as a paragraph below it."""
        caption = escape(self.caption)
        described = UNESCAPED_BRACKET.sub(r"\\\g<0>", caption)
        return f"![{described}]({self.file})\n\n*{caption}*"
