"""What scorers are given: multiple-choice items (probes are turned into them, and so can any benchmark be) and open questions.

A new multiple-choice benchmark is a function that yields `Item`s.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fvlm_core.data.batch import Sample, Turn
from fvlm_core.eval.subject import Subject


@dataclass(frozen=True)
class Media:
    """What an item shows."""

    frames: np.ndarray
    """uint8 [F, H, W, 3]: the distinct frames."""
    shown: list[list[int]]
    """Per video or image, the frames to show in order, as indexes into `frames`."""

    def shuffled(self, seed: int, name: str) -> "Media":
        """The frames of each video in another order (a video whose frames are all equal, or alone, stays as it is)."""
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return Media(self.frames, [_other_order(indexes, rng) for indexes in self.shown])


NO_MEDIA = Media(np.zeros((0, 1, 1, 3), np.uint8), [])
"""For the blind baseline."""


@dataclass(frozen=True)
class Item:
    """One multiple-choice question."""

    id: str
    media: Media
    question: str
    choices: list[str]
    gold: int
    """Index of the right choice."""
    groups: dict[str, str]
    """What results are broken down by; `clip` is the unit of resampling, `task` the kind of question."""


@dataclass(frozen=True)
class ClipQuestion:
    """A question with a free answer, as the shards hold it."""

    sample: Sample
    """With its answer; labels on the answer only."""
    question: str
    answer: str
    cells: list[tuple[int, int]] | None = None
    """Row and column of the asked cell in each frame, where the question is about a place; the answer then has one character a frame."""

    @property
    def clip(self) -> str:
        return self.sample.key


def without_answer(sample: Sample, *, question_first: bool) -> Sample:
    """The sample up to where the answer begins, for generation."""
    *before, last = sample.turns
    return replace(sample, turns=[*before, Turn(last.question_ids, [])], question_first=question_first)


def choice_samples(item: Item, media: Media, subject: Subject) -> list[Sample]:
    """A sample per choice, question first: its labelled tokens are the choice's text and the end of the turn."""
    question = subject.encode(item.question)
    return [
        Sample(item.id, item.groups["task"], media.frames, media.shown, [Turn(question, subject.encode(choice))], question_first=True)
        for choice in item.choices
    ]


def _other_order(indexes: Sequence[int], rng: np.random.Generator) -> list[int]:
    if len(set(indexes)) < 2:
        return list(indexes)
    while True:
        order = [indexes[i] for i in rng.permutation(len(indexes))]
        if order != list(indexes):
            return order
