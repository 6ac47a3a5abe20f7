"""Aggregate the records of a benchmark: its numbers in every condition, with baselines and paired differences.

Results are computed from the records alone, so they can be recomputed without a model. This module does not import torch.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import cast

import numpy as np

from fvlm_core.eval.answerers.answerer import Order
from fvlm_core.eval.answers import parse_choice, parse_yes_no, score
from fvlm_core.eval.benchmarks.benchmark import Benchmark, Loaded, Scorer
from fvlm_core.eval.estimates import Estimate
from fvlm_core.eval.records import SCORERS, ItemRecord, option_scores
from fvlm_core.eval.stats import DECIMALS, Bootstrap, holm, sign_flip
from fvlm_core.settings import Settings

SIGNIFICANT = 0.05
GENERATED = "generated"
"""Scoring method that parses the generated answer."""
MOST_GROUP_VALUES = 60
"""Results are not broken down by a group with more values than this: such values are identifiers."""


class ConditionScores(Settings):
    """Scores in one condition."""

    mode: str
    order: Order
    view: str
    score: Estimate
    """The headline metric over questions."""
    macro: Estimate | None = None
    """Mean of the metric's means over the benchmark's tasks, if that is the headline."""
    by_scorer: dict[str, Estimate] = {}
    """Accuracy by scoring method."""
    by_group: dict[str, dict[str, Estimate]] = {}
    positions: list[int] = []
    """How often the headline scorer chose each letter or position."""
    unparsed: int = 0
    """Number of generated answers that name no choice; they count as wrong."""
    yes_no: dict[str, float] = {}
    """precision, recall, f1 and yes_share (of the predictions), with yes as the positive class."""

    @property
    def headline(self) -> Estimate:
        """The number in the result table."""
        return self.macro or self.score


class Difference(Settings):
    """Paired difference between two conditions on the same questions."""

    a: str
    b: str
    value: Estimate
    """Headline in `a` minus that in `b`; if the headline is a mean over tasks, every task has the same weight here too."""
    p_value: float
    """p-value of a two-sided sign-flip test by clip."""
    p_holm: float
    """p-value, Holm-adjusted over all tests of the benchmark."""

    @property
    def noise(self) -> bool:
        """Whether the difference is not significant."""
        return self.p_holm >= SIGNIFICANT


class BenchmarkResult(Settings):
    """Result of one benchmark."""

    name: str
    title: str
    dataset: str
    """Hub identifier of the dataset, or a slug made from the benchmark's name."""
    split: str
    metric: str
    """accuracy, anls, vqa, number or exact."""
    scorer: str
    """Scoring method of the headline; empty for open questions."""
    macro: str = ""
    """The headline is the mean over the values of this group; empty: the mean over questions."""
    note: str = ""
    prompt: str
    """Hash of the prompt template."""
    rows: int
    """Number of rows considered."""
    questions: int
    """Number of questions that were asked and scored."""
    clips: int
    missing: int
    """Number of items without media."""
    unreadable: int
    """Number of rows that could not be converted to items."""
    undecodable: dict[str, str] = {}
    """Errors of the items whose media could not be decoded, by item."""
    frames: float
    """Mean number of shown frames per item."""
    most_frames: int
    fps: float
    frame_px: int
    chance: float | None = None
    """Expected accuracy of a random choice; None without multiple-choice questions. Open questions count as wrong."""
    majority: float | None = None
    """Accuracy of always choosing the most frequent gold position. Open questions count as wrong."""
    gold_positions: list[int] = []
    conditions: dict[str, ConditionScores]
    differences: list[Difference] = []

    def of(self, order: Order, view: str = "shown") -> dict[str, ConditionScores]:
        """Scores by mode, for one order and view."""
        return {one.mode: one for one in self.conditions.values() if one.order == order and one.view == view}

    @property
    def main_order(self) -> Order:
        """The question order of the headline."""
        return next(iter(self.conditions.values())).order

    @property
    def blind(self) -> Estimate | None:
        """The headline number without frames."""
        return self.conditions["blind"].headline if "blind" in self.conditions else None


def benchmark_result(
    loaded: Loaded, records: Sequence[ItemRecord], bootstrap: Bootstrap, *, fps: float, frame_px: int, scorer: Scorer | None = None
) -> BenchmarkResult:
    """Aggregate records, at least one of which must be without an error.

    `scorer` is the scoring method of the headline; None uses the benchmark's default.
    """
    benchmark = loaded.benchmark
    good = [record for record in records if not record.error]
    undecodable = {record.id: record.error for record in records if record.error}
    used = headline_scorer(benchmark, good, scorer)
    names = list(good[0].said)
    values = {name: np.array([_value(record, name, benchmark, used) for record in good]) for name in names}
    golds = [record.gold for record in good if record.gold is not None]
    widest = max((len(record.choices) for record in good), default=0)
    positions = np.bincount(np.array(golds, int), minlength=widest) if golds else np.zeros(0, int)
    return BenchmarkResult(
        name=benchmark.name,
        title=benchmark.title,
        dataset=benchmark.hub[0] if benchmark.hub else f"fvlm-{benchmark.name}",
        split=benchmark.split,
        metric="accuracy" if benchmark.answers == "yes_no" else benchmark.answers,
        scorer=used if golds else "",
        macro=benchmark.macro,
        note=benchmark.note,
        prompt=benchmark.prompt.hash,
        rows=loaded.rows,
        questions=len(good),
        clips=len({record.clip for record in good}),
        missing=len(loaded.missing),
        unreadable=len(loaded.unreadable),
        undecodable=undecodable,
        frames=round(float(np.mean([record.frames for record in good])), DECIMALS),
        most_frames=max(record.frames for record in good),
        fps=fps,
        frame_px=frame_px,
        chance=round(float(np.mean([1 / len(record.choices) if record.choices else 0 for record in good])), DECIMALS) if golds else None,
        majority=round(float(positions.max() / len(good)), DECIMALS) if golds else None,
        gold_positions=positions.tolist(),
        conditions={name: _condition(name, good, benchmark, used, values[name], widest, bootstrap) for name in names},
        differences=_differences(values, good, benchmark.macro, bootstrap),
    )


def headline_scorer(benchmark: Benchmark, records: Sequence[ItemRecord], wanted: Scorer | None = None) -> str:
    """The scoring method of the headline: the wanted one, else the benchmark's default, else the first available.

    Empty if all questions are open.
    """
    asked = _scorers(records, next(iter(records[0].said)))
    return next((name for name in (wanted, benchmark.scorer, *asked) if name in asked), "") or ""


def chosen(record: ItemRecord, condition: str, scorer: str, *, yes_no: bool = False) -> int | None:
    """Index of the chosen option (the first one of a tie); None if a generated answer names no option."""
    if scorer == GENERATED:
        text = record.said[condition].text or ""
        return parse_yes_no(text) if yes_no else parse_choice(text, record.choices)
    scores = option_scores(record, condition, cast(Scorer, scorer))
    return None if scores is None else int(scores.argmax())


def _value(record: ItemRecord, condition: str, benchmark: Benchmark, scorer: str) -> float:
    """Score of the model's answer, 0..1."""
    if record.choices:
        return float(chosen(record, condition, scorer, yes_no=benchmark.answers == "yes_no") == record.gold)
    return score(record.said[condition].text or "", record.answers, benchmark.answers, record.hints)


def _condition(
    name: str, records: Sequence[ItemRecord], benchmark: Benchmark, scorer: str, values: np.ndarray, widest: int, bootstrap: Bootstrap
) -> ConditionScores:
    clips = [record.clip for record in records]
    first, _, rest = name.partition("/")
    order, mode, view = _parts(first, rest, records)
    picks = [chosen(record, name, scorer, yes_no=benchmark.answers == "yes_no") if record.choices else None for record in records]
    made = [pick for pick in picks if pick is not None]
    by_scorer = {}
    for other in _scorers(records, name):
        right = [chosen(record, name, other, yes_no=benchmark.answers == "yes_no") == record.gold for record in records if record.choices]
        by_scorer[other] = bootstrap.share(right, [record.clip for record in records if record.choices])
    return ConditionScores(
        mode=mode,
        order=order,
        view=view,
        score=estimate_of(values, clips, bootstrap),
        macro=_macro(values, [record.groups.get(benchmark.macro, "") for record in records], clips, bootstrap) if benchmark.macro else None,
        by_scorer=by_scorer,
        by_group=_by_group(records, values, bootstrap),
        positions=np.bincount(np.array(made, int), minlength=widest).tolist() if widest else [],
        unparsed=sum(pick is None for pick, record in zip(picks, records, strict=True) if record.choices),
        yes_no=yes_no_scores(made, [r.gold or 0 for r, p in zip(records, picks, strict=True) if p is not None], len(records))
        if benchmark.answers == "yes_no"
        else {},
    )


def estimate_of(values: np.ndarray, clips: Sequence[str], bootstrap: Bootstrap) -> Estimate:
    """Mean of the values; if all are 0 or 1, as a share (see `Bootstrap.share`)."""
    is_share = bool(np.isin(values, (0.0, 1.0)).all())
    return bootstrap.share(values == 1, clips) if is_share else bootstrap.mean(values, clips)


def yes_no_scores(predicted: Sequence[int], gold: Sequence[int], asked: int) -> dict[str, float]:
    """Precision, recall and F1 with yes (index 0) as the positive class, and the share of yes among all questions; 0 if undefined."""
    said_yes, is_yes = np.array(predicted, int) == 0, np.array(gold, int) == 0
    both = int((said_yes & is_yes).sum())
    precision = both / int(said_yes.sum()) if said_yes.any() else 0.0
    recall = both / int(is_yes.sum()) if is_yes.any() else 0.0
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    found = {"precision": precision, "recall": recall, "f1": f1, "yes_share": float(said_yes.sum()) / asked}
    return {name: round(value, DECIMALS) for name, value in found.items()}


def _parts(first: str, rest: str, records: Sequence[ItemRecord]) -> tuple[Order, str, str]:
    """Order, mode and view from a condition's name; controls have the headline's order."""
    main: Order = "question_after" if next(iter(records[0].said)).startswith("question_after") else "question_first"
    if first == "question_first" or first == "question_after":
        return first, rest, "shown"
    return main, rest or first, first


def _scorers(records: Sequence[ItemRecord], condition: str) -> list[str]:
    """Scoring methods for which the records have data."""
    one = next((record for record in records if record.choices), None)
    if one is None:
        return []
    found: list[str] = [scorer for scorer in SCORERS if option_scores(one, condition, scorer) is not None]
    return found + ([GENERATED] if one.said[condition].text is not None else [])


def _by_group(records: Sequence[ItemRecord], values: np.ndarray, bootstrap: Bootstrap) -> dict[str, dict[str, Estimate]]:
    """Results by every group that has more than one and at most `MOST_GROUP_VALUES` values."""
    tables: dict[str, dict[str, Estimate]] = {}
    for group in dict.fromkeys(name for record in records for name in record.groups if name != "clip"):
        of = [record.groups.get(group, "") for record in records]
        kinds = sorted(set(of))
        if not 1 < len(kinds) <= MOST_GROUP_VALUES:
            continue
        tables[group] = {}
        for kind in kinds:
            rows = [place for place, value in enumerate(of) if value == kind]
            tables[group][kind or "(none)"] = estimate_of(values[rows], [records[place].clip for place in rows], bootstrap)
    return tables


def _macro(values: np.ndarray, tasks: Sequence[str], clips: Sequence[str], bootstrap: Bootstrap) -> Estimate:
    """Mean of the tasks' means: every task has the same weight, regardless of its number of questions."""
    names = sorted(set(tasks))
    rows = np.zeros((len(values), 2 * len(names)))
    for place, (task, value) in enumerate(zip(tasks, values, strict=True)):
        rows[place, names.index(task)] = value
        rows[place, len(names) + names.index(task)] = 1

    def mean_of_means(sums: np.ndarray) -> np.ndarray:
        return np.nanmean(sums[..., : len(names)] / sums[..., len(names) :], axis=-1)

    return bootstrap.estimate(rows, clips, mean_of_means)


def _differences(values: dict[str, np.ndarray], records: Sequence[ItemRecord], macro: str, bootstrap: Bootstrap) -> list[Difference]:
    """All pairs of modes in each order; in the headline's order, also each mode against no frames and against shuffled frames.

    If the headline is a mean over the tasks of `macro`, a question weighs 1 / (number of tasks x number of its task's questions) in the
    sign-flip test, so what is tested is the difference of the headlines.
    """
    clips, tasks = [record.clip for record in records], [record.groups.get(macro, "") for record in records]
    _, members, sizes = np.unique(tasks, return_inverse=True, return_counts=True)
    weights = len(tasks) / (len(sizes) * sizes[members]) if macro else np.ones(len(tasks))  # their mean is 1
    shown = [name for name in values if name.startswith("question_")]
    main = [name for name in shown if name.split("/")[0] == shown[0].split("/")[0]]
    pairs = [(a, b) for a, b in combinations(shown, 2) if a.split("/")[0] == b.split("/")[0]]
    pairs += [(name, "blind") for name in main if "blind" in values]
    pairs += [(name, other) for name in main if (other := f"shuffled/{name.split('/')[1]}") in values]
    gains = [values[a] - values[b] for a, b in pairs]
    p_values = [sign_flip(weights * gain, clips, seed=bootstrap.seed) for gain in gains]
    estimates = [_macro(gain, tasks, clips, bootstrap) if macro else bootstrap.mean(gain, clips) for gain in gains]
    return [
        Difference(a=a, b=b, value=value, p_value=p, p_holm=adjusted)
        for (a, b), value, p, adjusted in zip(pairs, estimates, p_values, holm(p_values), strict=True)
    ]
