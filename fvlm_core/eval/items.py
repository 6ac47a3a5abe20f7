"""The common item type of all benchmarks. This module does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fvlm_core.eval.estimates import CLIP
from fvlm_core.eval.media import Source


class UnreadableItemError(Exception):
    """A row of a benchmark cannot be converted to an item. Such rows are counted, never skipped silently."""


@dataclass(frozen=True)
class Item:
    """One question: multiple choice if it has choices, otherwise open."""

    id: str
    media: Source
    question: str
    """The question without its choices."""
    choices: list[str] = field(default_factory=list)
    """Texts of the choices, without letters."""
    gold: int | None = None
    """Index of the correct choice."""
    answers: list[str] = field(default_factory=list)
    """Accepted answers of an open question."""
    groups: dict[str, str] = field(default_factory=dict)
    """Groups for the breakdown of results, by name; `clip` is the resampling unit, `task` the kind of question."""
    hints: dict[str, str] = field(default_factory=dict)
    """Additional information for scoring, e.g. the precision of a number."""

    @property
    def clip(self) -> str:
        """The resampling unit of the item."""
        return self.groups.get(CLIP) or self.media.key


def gold_letter(choices: Sequence[str], answer: str) -> int:
    """Like `gold_index`, but a single letter always means the choice with that letter, even if it is also the text of a choice
    (musical notes, vitamins, points of a figure)."""
    place = _letters_place(choices, answer.strip())
    return gold_index(choices, answer) if place is None else place


def gold_index(choices: Sequence[str], answer: object) -> int:
    """Index of the correct choice, given by its index, its text or its letter. Raises UnreadableItemError if none of them matches."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
        raise UnreadableItemError(f"the right choice is number {answer}, but there are only {len(choices)} choices")
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
    """Index of the choice with the given letter; None if `text` is not the letter of a choice."""
    return ord(text) - ord("A") if len(text) == 1 and 0 <= ord(text) - ord("A") < len(choices) else None
