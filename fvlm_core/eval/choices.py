"""Multiple choice: accuracy in every mode, and what it has to be compared with.

A choice's score is the mean log-likelihood per token of its text (with the end of the turn) after the question: no letters,
so a model needs no training on letters, and short choices have no advantage. Accuracy alone misleads (a model that sees
nothing can beat chance), so the blind, shuffled-frames and majority baselines, the positions chosen and a paired test between
modes belong to it.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from fvlm_core.eval.items import NO_MEDIA, Item, Media, choice_samples
from fvlm_core.eval.results import ChoiceBaselines, ChoiceScores, PairedTest
from fvlm_core.eval.stats import DECIMALS, Bootstrap, mcnemar
from fvlm_core.eval.subject import Subject
from fvlm_core.model.names import Mode


def option_scores(subject: Subject, items: Sequence[Item], media: Sequence[Media], modes: Sequence[Mode]) -> dict[Mode, list[np.ndarray]]:
    """Mean log-likelihood per token of every choice of every item, each item shown its `media`: per mode, a float64 [choices] per item.

    Choices of neighbouring items share batches, so items about one clip should stand together.
    """
    samples = [sample for item, shown in zip(items, media, strict=True) for sample in choice_samples(item, shown, subject)]
    ends = np.cumsum([len(item.choices) for item in items])[:-1]
    losses = subject.sample_losses(samples, modes)
    return {mode: np.split(-sums[:, 0] / sums[:, 1], ends) for mode, sums in losses.items()}


def predictions(subject: Subject, items: Sequence[Item], media: Sequence[Media], modes: Sequence[Mode]) -> dict[Mode, np.ndarray]:
    """The chosen option of every item, per mode int64 [items]; the first of equals."""
    scores = option_scores(subject, items, media, modes)
    return {mode: np.array([int(options.argmax()) for options in of_items]) for mode, of_items in scores.items()}


def choice_results(
    subject: Subject, items: Sequence[Item], modes: Sequence[Mode], bootstrap: Bootstrap
) -> tuple[ChoiceBaselines, dict[Mode, ChoiceScores], list[PairedTest]]:
    """Score all items in all modes, with frames, with shuffled frames, and without."""
    gold = np.array([item.gold for item in items])
    clips = [item.groups["clip"] for item in items]
    tasks = np.array([item.groups["task"] for item in items])
    options = max(len(item.choices) for item in items)
    positions = np.bincount(gold, minlength=options)

    seen = predictions(subject, items, [item.media for item in items], modes)
    shuffled = predictions(subject, items, [item.media.shuffled(bootstrap.seed, item.groups["clip"]) for item in items], modes)
    blind = predictions(subject, items, [NO_MEDIA] * len(items), ["coarse_only"])["coarse_only"]

    baselines = ChoiceBaselines(
        chance=round(float(np.mean([1 / len(item.choices) for item in items])), DECIMALS),
        majority=round(float(positions.max() / len(items)), DECIMALS),
        blind=bootstrap.mean(blind == gold, clips),
        gold_positions=positions.tolist(),
        questions=len(items),
        clips=len(set(clips)),
    )
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
    tests = [_paired(a, b, seen[a] == gold, seen[b] == gold, clips, bootstrap) for a, b in combinations(modes, 2)]
    return baselines, scores, tests


def _paired(a: Mode, b: Mode, right_a: np.ndarray, right_b: np.ndarray, clips: list[str], bootstrap: Bootstrap) -> PairedTest:
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
