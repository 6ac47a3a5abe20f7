"""Question order: the 2x2 that shows whether looking helps, on questions about places in a clip.

Queries of the fine and the autoregressive pass can know the question only when it comes before the frames; the coarse pass
never looks anywhere in particular. So fine should beat coarse with the question first, and only there. The answers of
these questions have one character a frame, which is what is scored: a first frame that is worse than the others is the
mark of a first query that knows nothing.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fvlm_core.data.gaze import GRID
from fvlm_core.eval.items import ClipQuestion, without_answer
from fvlm_core.eval.results import ORDERS, Estimate, Order, OrderCell
from fvlm_core.eval.stats import Bootstrap
from fvlm_core.eval.subject import Subject
from fvlm_core.model.names import Mode

GAZE_CHANCE = 1 / GRID**2
"""Hit rate of a look at a random cell."""


def order_results(subject: Subject, questions: Sequence[ClipQuestion], modes: Sequence[Mode], bootstrap: Bootstrap) -> list[OrderCell]:
    """Every order in every mode, on questions that have cells."""
    return [cell for order in ORDERS for cell in _cells_of(order, subject, questions, modes, bootstrap)]


def gaze_hits(attention: np.ndarray, cells: Sequence[tuple[int, int]]) -> np.ndarray:
    """Whether the peak of each frame's attention [T, rows, columns] lies in that frame's asked cell: bool [T]."""
    frames, rows, columns = attention.shape
    peaks = attention.reshape(frames, -1).argmax(1)
    centres = np.stack([(peaks // columns + 0.5) / rows, (peaks % columns + 0.5) / columns], 1)
    return ((centres * GRID).astype(int) == np.asarray(cells)).all(1)


def _cells_of(
    order: Order, subject: Subject, questions: Sequence[ClipQuestion], modes: Sequence[Mode], bootstrap: Bootstrap
) -> list[OrderCell]:
    first = order == "question_first"
    losses = subject.sample_losses([replace(question.sample, question_first=first) for question in questions], modes)
    open_ended = [without_answer(question.sample, question_first=first) for question in questions]
    longest = max(len(question.sample.turns[-1].answer_ids) for question in questions)
    cells = []
    for mode in modes:
        answers = subject.generate(open_ended, mode, max_new_tokens=longest + 1)
        right = [
            np.array([given == wanted for given, wanted in zip(answer.ljust(len(question.answer)), question.answer, strict=False)])
            for answer, question in zip(answers, questions, strict=True)
        ]
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
                first_frame=everywhere[0],
                later_frames=_over_frames([row[1:] for row in right], clips, bootstrap) if len(everywhere) > 1 else None,
                by_frame=everywhere,
                loss=bootstrap.weighted_mean(losses[mode], clips),
                gaze_hit_rate=_over_frames([row[1:] for row in hits], clips, bootstrap) if hits and len(everywhere) > 1 else None,
                gaze_hit_rate_first_frame=_over_frames([row[:1] for row in hits], clips, bootstrap) if hits else None,
            )
        )
    return cells


def _over_frames(rows: Sequence[np.ndarray], clips: Sequence[str], bootstrap: Bootstrap) -> Estimate:
    """Share of truths over all frames of all questions."""
    return bootstrap.weighted_mean(np.array([[row.sum(), len(row)] for row in rows]), clips)


def _by_frame(rows: Sequence[np.ndarray], clips: Sequence[str], bootstrap: Bootstrap) -> list[Estimate]:
    estimates = []
    for t in range(max(len(row) for row in rows)):
        long_enough = [(row[t], clip) for row, clip in zip(rows, clips, strict=True) if t < len(row)]
        estimates.append(bootstrap.mean([bool(value) for value, _ in long_enough], [clip for _, clip in long_enough]))
    return estimates
