"""Multiple choice: accuracy in every mode, and what it has to be compared with.

A choice's score is the mean log-likelihood per token of its text (with the end of the turn) after the question: no letters,
so a model needs no training on letters, and short choices have no advantage. Accuracy alone misleads (a model that sees
nothing can beat chance), so the blind, shuffled-frames and majority baselines, the positions chosen and a paired test between
modes belong to it.

A benchmark of multiple-choice questions is a part whose `measure` reads `Item`s and returns `measure_choices(context, items, ITS_RESULT)`,
with `ITS_RESULT` a subclass of `ChoiceResult` that says its title and its dataset.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from fvlm_core.eval.estimates import Estimate, Metric, PairedTest
from fvlm_core.eval.part import Context, Count, Part, PartResult, require
from fvlm_core.eval.stats import DECIMALS, Bootstrap, mcnemar
from fvlm_core.eval.tables import by_mode, paired_table
from fvlm_core.model.names import Mode
from fvlm_core.settings import Settings
from fvlm_core.tables import Table, number

if TYPE_CHECKING:  # they need torch
    from fvlm_core.eval.items import Item, Media
    from fvlm_core.eval.subject import Subject


class ChoiceScores(Settings):
    """Multiple choice in one mode, question first."""

    accuracy: Estimate
    by_task: dict[str, Estimate]
    predicted_positions: list[int]
    """How often each option position was chosen: far from `ChoiceBaselines.gold_positions` means position bias."""
    shuffled_frames: Estimate
    """Accuracy with each clip's frames in another order."""


class ChoiceBaselines(Settings):
    """What multiple-choice accuracy has to be compared with."""

    chance: float
    majority: float
    """Always the most frequent gold position."""
    blind: Estimate
    """The model without frames (the same in every mode)."""
    gold_positions: list[int]
    """How often each option position is right."""
    questions: int
    clips: int


class ChoiceResult(PartResult):
    """Every mode on the same questions."""

    title = "Multiple choice"

    modes: dict[Mode, ChoiceScores]
    baselines: ChoiceBaselines
    paired_tests: list[PairedTest] = []
    """Accuracy of every pair of modes."""

    def count(self) -> int:
        """Questions."""
        return self.baselines.questions

    def headline(self) -> list[Metric]:
        """Accuracy, and that of always choosing the most frequent position."""
        base = self.baselines
        return [
            Metric(
                name=self.title.lower(),
                values={mode: scores.accuracy for mode, scores in self.modes.items()},
                baselines={"chance": base.chance, "no frames": base.blind, "constant": base.majority},
                hub_type="accuracy",
            )
        ]

    def tables(self) -> list[Table]:
        """Accuracy beside its baselines, by task, and between modes."""
        base = self.baselines
        rows = [
            [mode, number(scores.accuracy), number(scores.shuffled_frames), str(scores.predicted_positions)]
            for mode, scores in self.modes.items()
        ]
        rows += [
            ["no frames (blind)", number(base.blind), "", ""],
            ["always the most frequent position", number(base.majority), "", str(base.gold_positions)],
            ["chance", number(base.chance), "", ""],
        ]
        note = f"{base.questions} questions about {base.clips} clips; mean log-likelihood per token of each option's text."
        tables = [Table(title=self.title, head=["", "accuracy", "frames shuffled", "positions chosen"], rows=rows, note=note)]
        tasks = sorted({task for scores in self.modes.values() for task in scores.by_task})
        if len(tasks) > 1:
            by_task = {task: {mode: scores.by_task.get(task) for mode, scores in self.modes.items()} for task in tasks}
            tables.append(by_mode(f"{self.title} by task", "task", list(self.modes), by_task))
        return tables + ([paired_table(f"{self.title} between modes", self.paired_tests)] if self.paired_tests else [])


class MultipleChoice(Part):
    """Multiple choice on the probes of the validation split."""

    result = ChoiceResult

    questions: Count = 128
    """Multiple-choice questions; 0 leaves them out."""

    def measure(self, context: Context) -> ChoiceResult:
        """Score the validation split's questions."""
        items = context.split.items(self.questions)
        require(len(items), self.questions, "multiple-choice questions")
        return measure_choices(context, items, ChoiceResult)


AnyChoiceResult = TypeVar("AnyChoiceResult", bound=ChoiceResult)


def measure_choices(context: Context, items: "Sequence[Item]", result: type[AnyChoiceResult]) -> AnyChoiceResult:
    """Score items (at least one) in all modes, with frames, with shuffled frames, and without."""
    from fvlm_core.eval.items import NO_MEDIA

    subject, modes, bootstrap = context.subject, context.modes, context.bootstrap
    gold = np.array([item.gold for item in items])
    clips = [item.groups["clip"] for item in items]
    tasks = np.array([item.groups["task"] for item in items])
    options = max(len(item.choices) for item in items)
    positions = np.bincount(gold, minlength=options)

    seen = predictions(subject, items, [item.media for item in items], modes)
    shuffled = predictions(subject, items, [item.media.shuffled(bootstrap.seed, item.groups["clip"]) for item in items], modes)
    blind = predictions(subject, items, [NO_MEDIA] * len(items), ["coarse_only"])["coarse_only"]

    scores: dict[Mode, ChoiceScores] = {}
    for mode in modes:
        right = seen[mode] == gold
        scores[mode] = ChoiceScores(
            accuracy=bootstrap.mean(right, clips),
            by_task={
                task: bootstrap.mean(right[tasks == task], [c for c, t in zip(clips, tasks, strict=True) if t == task])
                for task in sorted(set(tasks.tolist()))
            },
            predicted_positions=np.bincount(seen[mode], minlength=options).tolist(),
            shuffled_frames=bootstrap.mean(shuffled[mode] == gold, clips),
        )
    return result(
        modes=scores,
        baselines=ChoiceBaselines(
            chance=round(float(np.mean([1 / len(item.choices) for item in items])), DECIMALS),
            majority=round(float(positions.max() / len(items)), DECIMALS),
            blind=bootstrap.mean(blind == gold, clips),
            gold_positions=positions.tolist(),
            questions=len(items),
            clips=len(set(clips)),
        ),
        paired_tests=[_paired(a, b, seen[a] == gold, seen[b] == gold, clips, bootstrap) for a, b in combinations(modes, 2)],
    )


def option_scores(
    subject: "Subject", items: "Sequence[Item]", media: "Sequence[Media]", modes: Sequence[Mode]
) -> dict[Mode, list[np.ndarray]]:
    """Mean log-likelihood per token of every choice of every item, each item shown its `media`: per mode, a float64 [choices] per item.

    Choices of neighbouring items share batches, so items about one clip should stand together.
    """
    from fvlm_core.eval.items import choice_samples

    samples = [sample for item, shown in zip(items, media, strict=True) for sample in choice_samples(item, shown, subject)]
    ends = np.cumsum([len(item.choices) for item in items])[:-1]
    losses = subject.sample_losses(samples, modes)
    return {mode: np.split(-sums[:, 0] / sums[:, 1], ends) for mode, sums in losses.items()}


def predictions(subject: "Subject", items: "Sequence[Item]", media: "Sequence[Media]", modes: Sequence[Mode]) -> dict[Mode, np.ndarray]:
    """The chosen option of every item, per mode int64 [items]; the first of equals."""
    scores = option_scores(subject, items, media, modes)
    return {mode: np.array([int(options.argmax()) for options in of_items]) for mode, of_items in scores.items()}


def _paired(a: Mode, b: Mode, right_a: np.ndarray, right_b: np.ndarray, clips: Sequence[str], bootstrap: Bootstrap) -> PairedTest:
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return PairedTest(
        a=a,
        b=b,
        metric="multiple_choice_accuracy",
        difference=bootstrap.mean(right_a.astype(float) - right_b, clips),
        only_a=only_a,
        only_b=only_b,
        p_value=mcnemar(only_a, only_b),
    )
