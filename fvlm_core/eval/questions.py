"""Questions as the model takes them: packed samples up to where the answer begins, and the validation split's with their answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fvlm_core.data.batch import Sample, Turn
from fvlm_core.eval.media import Media


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


def question_sample(key: str, media: Media, question_ids: Sequence[int], *, question_first: bool) -> Sample:
    """A question about media, up to where the answer begins."""
    return Sample(key, "benchmark", media.frames, media.shown, [Turn(list(question_ids), [])], question_first=question_first)
