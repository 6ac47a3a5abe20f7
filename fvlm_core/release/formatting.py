"""How the report writes modes, durations, code and lists."""

import re

from fvlm_core.model.names import Mode

MODES: dict[Mode, str] = {"coarse_only": "coarse-only", "coarse_fine": "coarse→fine", "autoregressive": "autoregressive"}


def duration(seconds: float) -> str:
    """E.g. `1 h 02 min`, `3 min 20 s`, `4.5 s`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def fenced(text: str, language: str = "") -> str:
    """A fenced code block, with a fence that is longer than any in `text`."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def items(lines: list[str]) -> str:
    """A markdown list."""
    return "\n".join(f"* {line}" for line in lines)
