"""Questions as model input: samples that end where the answer begins, and questions of the validation split with their answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fvlm_core.data.batch import Sample, Turn
from fvlm_core.eval.media import Media


@dataclass(frozen=True)
class ClipQuestion:
    """A question with a free-form answer from the shards."""

    sample: Sample
    """The sample with its answer; only the answer is labelled."""
    question: str
    answer: str
    cells: list[tuple[int, int]] | None = None
    """For a question about a place: row and column of the asked cell in each frame; the answer then has one character per frame."""

    @property
    def clip(self) -> str:
        return self.sample.key


def without_answer(sample: Sample, *, question_first: bool) -> Sample:
    """The sample without its last answer, for generation."""
    *before, last = sample.turns
    return replace(sample, turns=[*before, Turn(last.question_ids, [])], question_first=question_first)


def question_sample(key: str, media: Media, question_ids: Sequence[int], *, question_first: bool) -> Sample:
    """A sample that asks a question about media, without an answer."""
    return Sample(key, "benchmark", media.frames, media.shown, [Turn(list(question_ids), [])], question_first=question_first)
