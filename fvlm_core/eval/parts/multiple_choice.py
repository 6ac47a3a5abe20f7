"""Multiple choice on the probes of the validation split: accuracy in every mode, with baselines.

The score of a choice is the mean log-likelihood per token of its text after the question, corrected for its length (scorer `mean` of
`fvlm_core.eval.records.option_scores`). No letters are involved, so the model need not be trained on them.

Accuracy alone is misleading, because a model that sees nothing can beat chance. The result therefore includes the blind, shuffled-frames
and majority baselines, the chosen positions, and a paired test between modes.

Published benchmarks use the same code with all scoring methods: `parts/benchmarks.py`.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from fvlm_core.errors import UserError
from fvlm_core.eval.estimates import TASK, Estimate, Metric, PairedTest
from fvlm_core.eval.part import Context, Count, Part, PartResult, require
from fvlm_core.eval.stats import DECIMALS, Bootstrap, holm, sign_flip
from fvlm_core.eval.tables import by_mode, paired_table
from fvlm_core.model.names import Mode
from fvlm_core.settings import Settings
from fvlm_core.tables import Table, number

if TYPE_CHECKING:  # it needs torch
    from fvlm_core.eval.items import Item


class ChoiceScores(Settings):
    """Multiple-choice results in one mode, question first."""

    accuracy: Estimate
    by_task: dict[str, Estimate]
    predicted_positions: list[int]
    """How often each option position was chosen; a large deviation from `ChoiceBaselines.gold_positions` indicates position bias."""
    shuffled_frames: Estimate
    """Accuracy with the frames of each clip in another order."""


class ChoiceBaselines(Settings):
    """Baselines of multiple-choice accuracy."""

    chance: float
    majority: float
    """Accuracy of always choosing the most frequent gold position."""
    blind: Estimate
    """Accuracy of the model without frames (the same in every mode)."""
    gold_positions: list[int]
    """How often each option position is correct."""
    questions: int
    clips: int


class ChoiceResult(PartResult):
    """Multiple-choice results of every mode on the same questions."""

    title = "Multiple choice"

    modes: dict[Mode, ChoiceScores]
    baselines: ChoiceBaselines
    paired_tests: list[PairedTest] = []
    """Differences in accuracy between all pairs of modes."""

    def count(self) -> int:
        """Number of questions."""
        return self.baselines.questions

    def headline(self) -> list[Metric]:
        """Accuracy with its baselines."""
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
        """Accuracy with its baselines, by task, and paired differences between modes."""
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
        note = f"{base.questions} questions about {base.clips} clips. Score of an option: the mean log-likelihood of its tokens minus that "
        note += "of all options' tokens, times the square root of its number of tokens, so that short options are not favoured."
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
    """Number of multiple-choice questions; 0 skips this part."""

    def measure(self, context: Context) -> ChoiceResult:
        """Score the questions of the validation split."""
        items = context.split.items(self.questions)
        require(len(items), self.questions, "multiple-choice questions")
        return measure_choices(context, items)


def measure_choices(context: Context, items: "Sequence[Item]") -> ChoiceResult:
    """Score items (at least one) in all modes, with frames, with shuffled frames, and without."""
    from fvlm_core.eval.asking import AskSettings, ask_shard
    from fvlm_core.eval.benchmark_result import chosen
    from fvlm_core.eval.benchmarks.validation import BENCHMARK

    modes, bootstrap, answerer = context.modes, context.bootstrap, context.answerer
    settings = AskSettings(orders=["question_first"], modes=list(modes), letters=False)
    conditions = [one for one in answerer.conditions(["question_first"], settings.modes, controls=True) if not one.view.endswith("_query")]
    records = ask_shard(answerer, BENCHMARK, settings, conditions, items)
    if broken := [f"{record.id}: {record.error}" for record in records if record.error]:
        raise UserError(f"a validation sample is damaged: {broken[0]}", where="the shards", fix="make the shards again")
    gold = np.array([item.gold for item in items])
    clips = [record.clip for record in records]
    tasks = np.array([record.groups[TASK] for record in records])
    options = max(len(item.choices) for item in items)
    positions = np.bincount(gold, minlength=options)
    picked = {one.name: np.array([chosen(record, one.name, "mean") for record in records]) for one in conditions}
    seen: dict[Mode, np.ndarray] = {mode: picked[f"question_first/{mode}"] for mode in modes}
    scores: dict[Mode, ChoiceScores] = {}
    for mode in modes:
        right = seen[mode] == gold
        scores[mode] = ChoiceScores(
            accuracy=bootstrap.share(right, clips),
            by_task={
                task: bootstrap.share(right[tasks == task], [c for c, t in zip(clips, tasks, strict=True) if t == task])
                for task in sorted(set(tasks.tolist()))
            },
            predicted_positions=np.bincount(seen[mode], minlength=options).tolist(),
            shuffled_frames=bootstrap.share(picked[f"shuffled/{mode}"] == gold, clips),
        )
    return ChoiceResult(
        modes=scores,
        baselines=ChoiceBaselines(
            chance=round(float(np.mean([1 / len(item.choices) for item in items])), DECIMALS),
            majority=round(float(positions.max() / len(items)), DECIMALS),
            blind=bootstrap.share(picked["blind"] == gold, clips),
            gold_positions=positions.tolist(),
            questions=len(items),
            clips=len(set(clips)),
        ),
        paired_tests=_paired({mode: seen[mode] == gold for mode in modes}, clips, bootstrap),
    )


def _paired(right: dict[Mode, np.ndarray], clips: Sequence[str], bootstrap: Bootstrap) -> list[PairedTest]:
    """Test every pair of modes by clip; the p-values are Holm-adjusted over the pairs."""
    pairs = list(combinations(right, 2))
    p_values = [sign_flip(right[a].astype(float) - right[b], clips, seed=bootstrap.seed) for a, b in pairs]
    return [
        PairedTest(
            a=a,
            b=b,
            metric="multiple_choice_accuracy",
            difference=bootstrap.mean(right[a].astype(float) - right[b], clips),
            only_a=int((right[a] & ~right[b]).sum()),
            only_b=int((right[b] & ~right[a]).sum()),
            p_value=p_value,
        )
        for (a, b), p_value in zip(pairs, holm(p_values), strict=True)
    ]
