"""The typed item that every benchmark becomes. Nothing here needs torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fvlm_core.eval.estimates import CLIP
from fvlm_core.eval.media import Source


class UnreadableItemError(Exception):
    """Why a row of a benchmark is no item: counted, never skipped silently."""


@dataclass(frozen=True)
class Item:
    """One question, multiple choice where it has choices, else open."""

    id: str
    media: Source
    question: str
    """Without its choices."""
    choices: list[str] = field(default_factory=list)
    """Texts without letters."""
    gold: int | None = None
    """Index of the right choice."""
    answers: list[str] = field(default_factory=list)
    """Accepted answers of an open question."""
    groups: dict[str, str] = field(default_factory=dict)
    """What results are broken down by; `clip` is the unit of resampling, `task` the kind of question."""
    hints: dict[str, str] = field(default_factory=dict)
    """What a scorer has to know besides, e.g. the precision of a number."""

    @property
    def clip(self) -> str:
        """Unit of resampling."""
        return self.groups.get(CLIP) or self.media.key


def gold_letter(choices: Sequence[str], answer: str) -> int:
    """As `gold_index`, where the key is a letter also if a choice has that letter as its text (notes, vitamins, points of a figure)."""
    place = _letters_place(choices, answer.strip())
    return gold_index(choices, answer) if place is None else place


def gold_index(choices: Sequence[str], answer: object) -> int:
    """Place of the right choice, given by its letter, its number or its text. Raises UnreadableItemError where it is none of them."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
        raise UnreadableItemError(f"choice number {answer} is right, and there are {len(choices)}")
    text = str(answer).strip()
    exact = [place for place, choice in enumerate(choices) if choice.strip() == text]
    if len(exact) == 1:
        return exact[0]
    if (place := _letters_place(choices, text)) is not None:
        return place
    if len(exact) > 1:
        raise UnreadableItemError(f"the right answer {text!r} is {len(exact)} of the choices")
    raise UnreadableItemError(f"the right answer {text!r} is not among the {len(choices)} choices")


def _letters_place(choices: Sequence[str], text: str) -> int | None:
    """Place of the choice that a text names by its letter; None where it is no letter of a choice."""
    return ord(text) - ord("A") if len(text) == 1 and 0 <= ord(text) - ord("A") < len(choices) else None
