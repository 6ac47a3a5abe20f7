"""Question order: a 2x2 comparison (order x mode) that shows whether looking helps, on questions about places in a clip.

The queries of the fine and autoregressive passes can depend on the question only if it comes before the frames; the query of the coarse
pass is the same for every frame. So fine should beat coarse only with the question first. The answers to these questions have one
character per frame, and accuracy is over characters. A lower accuracy in the first frame shows that the first query had no information.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from fvlm_core.eval.estimates import Estimate, Metric
from fvlm_core.eval.part import Context, Count, Part, PartResult, require
from fvlm_core.eval.stats import DECIMALS, Bootstrap
from fvlm_core.model.names import Mode
from fvlm_core.settings import Settings
from fvlm_core.tables import Table, number, words

if TYPE_CHECKING:  # they need torch
    from fvlm_core.eval.questions import ClipQuestion
    from fvlm_core.eval.subject import Subject

Order = Literal["question_first", "question_after"]
ORDERS: tuple[Order, ...] = ("question_first", "question_after")


class OrderCell(Settings):
    """One cell of the question-order table: one order and mode, on questions about places in the clip.

    Accuracy is over the characters of the generated answer, one per frame. The first frame is reported separately, because its query
    has seen no frame yet.
    """

    order: Order
    mode: Mode
    accuracy: Estimate
    exact: Estimate | None = None
    """Share of answers that match exactly; a longer answer is wrong even if it begins with the correct one."""
    first_frame: Estimate
    later_frames: Estimate | None = None
    """None if clips have a single frame."""
    by_frame: list[Estimate]
    loss: Estimate
    """Loss in nats per labelled answer token."""
    gaze_hit_rate: Estimate | None = None
    """Share of frames after the first whose attention peak is in the asked cell (at random: `OrderResult.gaze_chance`)."""
    gaze_hit_rate_first_frame: Estimate | None = None


class OrderResult(PartResult):
    """Results by order and mode on the same questions; the first two modes are the 2x2 comparison."""

    title = "Question order"

    cells: list[OrderCell]
    constant: float
    """Accuracy of always answering the most frequent correct character."""
    gaze_chance: float | None = None
    """Hit rate of a random peak: 1 / number of cells. None for a model without queries."""
    questions: int

    def cell(self, order: Order, mode: Mode) -> OrderCell | None:
        """One cell; None if it was not measured."""
        return next((cell for cell in self.cells if (cell.order, cell.mode) == (order, mode)), None)

    def count(self) -> int:
        """Number of questions."""
        return self.questions

    def headline(self) -> list[Metric]:
        """Accuracy and gaze hit rate for each order."""
        metrics = []
        for order in ORDERS:
            cells = [cell for cell in self.cells if cell.order == order]
            metrics.append(
                Metric(
                    name=words(order),
                    values={cell.mode: cell.accuracy for cell in cells},
                    baselines={"constant": self.constant},
                )
            )
            hits: dict[str, Estimate | float] = {cell.mode: cell.gaze_hit_rate for cell in cells if cell.gaze_hit_rate is not None}
            if hits and self.gaze_chance is not None:
                metrics.append(Metric(name=f"gaze, {words(order)}", values=hits, baselines={"chance": self.gaze_chance}))
        return metrics

    def tables(self) -> list[Table]:
        """A table with one row per cell."""
        rows = [
            [
                words(cell.order),
                cell.mode,
                number(cell.accuracy),
                number(cell.exact),
                number(cell.first_frame),
                number(cell.later_frames),
                number(cell.loss),
                number(cell.gaze_hit_rate),
                str(cell.accuracy.n),
            ]
            for cell in self.cells
        ]
        note = f"Accuracy on questions about a place in each frame; a constant answer gets {number(self.constant)}. "
        note += "The coarse pass reads every frame with the same query, so only the other passes can use the question; with the question "
        note += "after the frames, no mode knows where to look."
        if self.gaze_chance is not None:
            note += f" Gaze on target: share of later frames whose attention peak is in the asked place; {self.gaze_chance:.3f} by chance."
        head = ["order", "mode", "accuracy", "exact answers", "first frame", "later frames", "loss", "gaze on target", "clips"]
        return [Table(title=self.title, head=head, rows=rows, note=note)]


class QuestionOrder(Part):
    """Questions about places in videos, before and after the frames."""

    result = OrderResult

    questions: Count = 96
    """Number of questions; 0 skips this part."""

    def measure(self, context: Context) -> OrderResult:
        """Measure every order in every mode, on the same questions."""
        asked = context.split.places(self.questions)
        require(len(asked), self.questions, "questions about places in videos")
        return order_results(context.subject, asked, context.modes, context.bootstrap)


def order_results(subject: "Subject", questions: "Sequence[ClipQuestion]", modes: Sequence[Mode], bootstrap: Bootstrap) -> OrderResult:
    """Measure every order in every mode, on questions that have `cells`."""
    from fvlm_core.data.gaze import GRID  # needs scikit-learn

    characters = "".join(question.answer for question in questions)
    return OrderResult(
        cells=[cell for order in ORDERS for cell in _cells_of(order, subject, questions, modes, bootstrap)],
        constant=round(max(map(characters.count, set(characters))) / len(characters), DECIMALS),
        gaze_chance=round(1 / GRID**2, DECIMALS) if subject.gazes else None,
        questions=len(questions),
    )


def gaze_hits(attention: np.ndarray, cells: Sequence[tuple[int, int]]) -> np.ndarray:
    """Whether the peak of each frame's attention [T, rows, columns] is in that frame's asked cell: bool [T]."""
    from fvlm_core.data.gaze import cells_of_patches

    frames, rows, columns = attention.shape
    peaks = attention.reshape(frames, -1).argmax(1)
    found = np.stack([cells_of_patches(rows)[peaks // columns], cells_of_patches(columns)[peaks % columns]], 1)
    return (found == np.asarray(cells)).all(1)


def _cells_of(
    order: Order, subject: "Subject", questions: "Sequence[ClipQuestion]", modes: Sequence[Mode], bootstrap: Bootstrap
) -> list[OrderCell]:
    from fvlm_core.eval.questions import without_answer  # needs torch

    first = order == "question_first"
    losses = subject.sample_losses([replace(question.sample, question_first=first) for question in questions], modes)
    open_ended = [without_answer(question.sample, question_first=first) for question in questions]
    longest = max(len(question.sample.turns[-1].answer_ids) for question in questions)
    cells = []
    for mode in modes:
        answers = subject.generate(open_ended, mode, max_new_tokens=longest + 1)
        right = [_characters(answer, question.answer) for answer, question in zip(answers, questions, strict=True)]
        hits = None
        if subject.gazes:
            maps = subject.gaze(open_ended, mode)
            hits = [gaze_hits(attention, question.cells or []) for attention, question in zip(maps, questions, strict=True)]
        clips = [question.clip for question in questions]
        everywhere = _by_frame(right, clips, bootstrap)
        cells.append(
            OrderCell(
                order=order,
                mode=mode,
                accuracy=_over_frames(right, clips, bootstrap),
                exact=bootstrap.share([answer == question.answer for answer, question in zip(answers, questions, strict=True)], clips),
                first_frame=everywhere[0],
                later_frames=_over_frames([row[1:] for row in right], clips, bootstrap) if len(everywhere) > 1 else None,
                by_frame=everywhere,
                loss=bootstrap.weighted_mean(losses[mode], clips),
                gaze_hit_rate=_over_frames([row[1:] for row in hits], clips, bootstrap) if hits and len(everywhere) > 1 else None,
                gaze_hit_rate_first_frame=_over_frames([row[:1] for row in hits], clips, bootstrap) if hits else None,
            )
        )
    return cells


def _characters(answer: str, wanted: str) -> np.ndarray:
    """Which characters are correct, bool [len(wanted)]; all false if the answer is too long: 5285123 is not 528."""
    if len(answer) > len(wanted):
        return np.zeros(len(wanted), bool)
    return np.array([given == character for given, character in zip(answer.ljust(len(wanted)), wanted, strict=True)])


def _over_frames(rows: Sequence[np.ndarray], clips: Sequence[str], bootstrap: Bootstrap) -> Estimate:
    """Share of true values over all frames of all questions."""
    return bootstrap.share(np.concatenate(rows), np.repeat(clips, [len(row) for row in rows]).tolist())


def _by_frame(rows: Sequence[np.ndarray], clips: Sequence[str], bootstrap: Bootstrap) -> list[Estimate]:
    estimates = []
    for t in range(max(len(row) for row in rows)):
        long_enough = [(row[t], clip) for row, clip in zip(rows, clips, strict=True) if t < len(row)]
        estimates.append(bootstrap.share([bool(value) for value, _ in long_enough], [clip for _, clip in long_enough]))
    return estimates
