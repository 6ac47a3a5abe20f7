"""Pictures with captions: a step lists its figures, and the report, the model card and the artifacts show them."""

import re

from fvlm_core.markdown import escape
from fvlm_core.settings import Settings

UNESCAPED_BRACKET = re.compile(r"(?<!\\)[\[\]]")


class Figure(Settings):
    """A PNG file with a caption."""

    file: str
    """Path relative to the folder of the step's result or of the report that contains the figure."""
    caption: str
    """One sentence of plain text."""
    chart: bool = True
    """True for a drawing on white, which dark pages may invert; False for video frames."""

    def markdown(self) -> str:
        """The image in markdown, with its caption as a paragraph below."""
        caption = escape(self.caption)
        described = UNESCAPED_BRACKET.sub(r"\\\g<0>", caption)
        return f"![{described}]({self.file})\n\n*{caption}*"
