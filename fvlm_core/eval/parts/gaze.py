"""Where the model looks: the entropy of its attention, and heat maps over the frames."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fvlm_core.config import Positive
from fvlm_core.eval.estimates import Estimate, Metric
from fvlm_core.eval.part import Context, Count, Part, PartResult, require
from fvlm_core.eval.stats import Bootstrap
from fvlm_core.figures import Figure
from fvlm_core.markdown import printable
from fvlm_core.model.names import Mode
from fvlm_core.settings import Settings
from fvlm_core.tables import words

if TYPE_CHECKING:  # they need torch and matplotlib
    from fvlm_core.eval.pictures import HeatRow
    from fvlm_core.eval.questions import ClipQuestion
    from fvlm_core.eval.subject import Subject

GAZE_PICTURE = "gaze.png"
"""The composite figure, for a README."""
COMPOSITE_QUESTIONS = 3
HEATMAP_FOLDER = "heatmaps"
COLOURS = "Orange is where the attention of a frame peaks, dark where there is none; a blue outline is the place asked for."


class HeatMap(Settings):
    """A heat map of one clip, one row per mode."""

    file: str
    key: str
    source: str
    question: str
    answer: str

    @property
    def caption(self) -> str:
        """The caption of the figure."""
        asked = f"asked “{self.question}” (right answer: {self.answer})"
        return f"Where the model looks in each frame of clip {self.key} ({self.source}), {asked}: a row per mode. {COLOURS}"


class GazeResult(PartResult):
    """Attention of the evaluated modes."""

    title = "Gaze"

    entropy: dict[Mode, Estimate]
    """Entropy of the query's attention over patches in the last layer (mean of heads), divided by that of uniform attention."""
    heatmaps: list[HeatMap] = []
    composite: Figure | None = None
    """`gaze.png`."""

    def count(self) -> int:
        """Number of heat maps."""
        return len(self.heatmaps)

    def headline(self) -> list[Metric]:
        """Attention entropy."""
        return [Metric(name="attention entropy", values={**self.entropy}, baselines={"uniform": 1.0})]

    def figures(self) -> list[Figure]:
        """The composite, then the heat maps of the clips."""
        maps = [Figure(file=one.file, caption=one.caption, chart=False) for one in self.heatmaps]
        return [self.composite, *maps] if self.composite else maps


class Gaze(Part):
    """Attention entropy and heat maps, for models with queries."""

    result = GazeResult
    needs_queries = True

    entropy_clips: Positive = 64
    """Number of videos over which the attention entropy is averaged."""
    heatmaps: Count = 4
    """Number of clips to draw; 0 skips all figures."""

    def measure(self, context: Context) -> GazeResult:
        """Measure the entropy in every mode; draw the modes whose queries depend on the clip."""
        subject, split = context.subject, context.split
        watched = split.clips(self.entropy_clips)
        require(len(watched), self.entropy_clips, "videos")
        entropy: dict[Mode, Estimate] = {mode: _entropy(subject, watched, mode, context.bootstrap) for mode in context.modes}
        looking: list[Mode] = [mode for mode in context.modes if mode != "coarse_only"]
        if not looking or not self.heatmaps:
            return GazeResult(entropy=entropy, absent={"heatmaps": "no mode evaluated looks" if self.heatmaps else "switched off"})
        asked = split.places_of_one_clip(COMPOSITE_QUESTIONS) or split.clips(COMPOSITE_QUESTIONS)
        return GazeResult(
            entropy=entropy,
            heatmaps=_heatmaps(subject, split.clips(self.heatmaps), looking, context.output),
            composite=_composite(subject, asked, looking[-1], context.output),
        )


def _entropy(subject: "Subject", questions: "Sequence[ClipQuestion]", mode: Mode, bootstrap: Bootstrap) -> Estimate:
    """Mean over all shown frames of the entropy of the attention over patches, divided by that of uniform attention."""
    rows = []
    for attention in subject.gaze([question.sample for question in questions], mode):
        flat = attention.reshape(len(attention), -1)
        entropy = -np.sum(flat * np.log(np.maximum(flat, np.finfo(float).tiny)), 1)
        rows.append([entropy.sum() / np.log(max(2, flat.shape[1])), len(flat)])
    return bootstrap.weighted_mean(np.array(rows), [question.clip for question in questions])


def _heatmaps(subject: "Subject", questions: "Sequence[ClipQuestion]", modes: Sequence[Mode], output: Path) -> list[HeatMap]:
    from fvlm_core.eval.pictures import draw

    maps = {mode: subject.gaze([question.sample for question in questions], mode) for mode in modes}
    made = []
    for index, question in enumerate(questions):
        file = f"{HEATMAP_FOLDER}/{question.clip}.png"
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        rows = [_row(words(mode), question, maps[mode][index]) for mode in modes]
        draw(output / file, rows, f"{question.question}  ({question.answer})")
        made.append(
            HeatMap(file=file, key=question.clip, source=question.sample.source, question=question.question, answer=question.answer)
        )
    return made


def _composite(subject: "Subject", questions: "Sequence[ClipQuestion]", mode: Mode, output: Path) -> Figure:
    """Draw one clip under several questions (or several clips): the bare frames if it is one clip, then one heat map per question."""
    from fvlm_core.eval.pictures import HeatRow, draw
    from fvlm_core.eval.questions import without_answer

    samples = [question.sample for question in questions]
    maps = subject.gaze(samples, mode)
    answers = subject.generate(
        [without_answer(sample, question_first=sample.question_first) for sample in samples],
        mode,
        max_new_tokens=max(len(sample.turns[-1].answer_ids) for sample in samples) + 1,
    )
    one_clip = len({question.clip for question in questions}) == 1
    rows = [HeatRow("the clip", _shown(questions[0]), None)] if one_clip else []
    rows.extend(
        _row(f"{question.question} Says {printable(answer) or 'nothing'}, right is {question.answer}.", question, attention)
        for question, answer, attention in zip(questions, answers, maps, strict=True)
    )
    draw(output / GAZE_PICTURE, rows, f"Where the model looks in each frame ({words(mode)})")
    what = f"one clip of the validation set ({questions[0].sample.source}), a row per question" if one_clip else "clips, a row each"
    return Figure(file=GAZE_PICTURE, chart=False, caption=f"Where the model looks ({mode}) in each frame of {what}. {COLOURS}")


def _row(label: str, question: "ClipQuestion", attention: np.ndarray) -> "HeatRow":
    from fvlm_core.eval.pictures import HeatRow

    return HeatRow(label, _shown(question), attention, question.cells)


def _shown(question: "ClipQuestion") -> np.ndarray:
    return question.sample.frames[[index for indexes in question.sample.media for index in indexes]]
