"""What a benchmark's records add up to: its numbers in every condition, beside what they have to be compared with.

Made from the records alone, so it can be made again without a model. Nothing here needs torch.
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
"""The scorer that parses what was said."""
MOST_GROUP_VALUES = 60
"""A group with more values than that is not broken down by: ids are no groups."""


class ConditionScores(Settings):
    """One condition."""

    mode: str
    order: Order
    view: str
    score: Estimate
    """The headline metric over questions."""
    macro: Estimate | None = None
    """Its mean over the benchmark's tasks, where that is the headline."""
    by_scorer: dict[str, Estimate] = {}
    """Accuracy by every way to read a choice."""
    by_group: dict[str, dict[str, Estimate]] = {}
    positions: list[int] = []
    """How often each letter or position was chosen by the headline scorer."""
    unparsed: int = 0
    """Generated answers that name no choice: wrong."""
    yes_no: dict[str, float] = {}
    """precision, recall, f1 and yes_share (of the predictions), with yes as the positive class."""

    @property
    def headline(self) -> Estimate:
        """The number of the result table."""
        return self.macro or self.score


class Difference(Settings):
    """Two conditions on the same questions."""

    a: str
    b: str
    value: Estimate
    """a minus b, of the metric over questions."""
    p_value: float
    """Two-sided sign-flip test by clip."""
    p_holm: float
    """Adjusted for all tests of the benchmark."""

    @property
    def noise(self) -> bool:
        """Whether it cannot be distinguished from no difference."""
        return self.p_holm >= SIGNIFICANT


class BenchmarkResult(Settings):
    """One benchmark."""

    name: str
    title: str
    dataset: str
    """Hub identifier of its dataset, or its name."""
    split: str
    metric: str
    """accuracy, anls, vqa, number or exact."""
    scorer: str
    """How a choice is read off the model for the headline; empty for open questions."""
    macro: str = ""
    """The group whose values' mean is the headline; empty for the mean over questions."""
    note: str = ""
    prompt: str
    """Hash of the text around the questions."""
    rows: int
    """Rows considered."""
    questions: int
    """Asked and counted."""
    clips: int
    missing: int
    """Items whose media are not there."""
    unreadable: int
    """Rows that are no items."""
    undecodable: dict[str, str] = {}
    """Items whose media could not be decoded, and why."""
    frames: float
    """Shown frames of an item, mean."""
    most_frames: int
    fps: float
    frame_px: int
    chance: float | None = None
    majority: float | None = None
    """Always the most frequent gold position."""
    gold_positions: list[int] = []
    conditions: dict[str, ConditionScores]
    differences: list[Difference] = []

    def of(self, order: Order, view: str = "shown") -> dict[str, ConditionScores]:
        """By mode, in an order and view."""
        return {one.mode: one for one in self.conditions.values() if one.order == order and one.view == view}

    @property
    def main_order(self) -> Order:
        """The order of the headline."""
        return next(iter(self.conditions.values())).order

    @property
    def blind(self) -> Estimate | None:
        """Without frames."""
        return self.conditions["blind"].headline if "blind" in self.conditions else None


def benchmark_result(
    loaded: Loaded, records: Sequence[ItemRecord], bootstrap: Bootstrap, *, fps: float, frame_px: int, scorer: Scorer | None = None
) -> BenchmarkResult:
    """Add up. At least one record must be without an error. `scorer` reads off the headline's choices; None is the benchmark's own."""
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
        chance=round(float(np.mean([1 / len(record.choices) for record in good if record.choices])), DECIMALS) if golds else None,
        majority=round(float(positions.max() / len(golds)), DECIMALS) if golds else None,
        gold_positions=positions.tolist(),
        conditions={name: _condition(name, good, benchmark, used, values[name], widest, bootstrap) for name in names},
        differences=_differences(values, [record.clip for record in good], bootstrap),
    )


def headline_scorer(benchmark: Benchmark, records: Sequence[ItemRecord], wanted: Scorer | None = None) -> str:
    """The wanted way to read a choice, else the benchmark's own, or the first that was asked for; empty where all questions are open."""
    asked = _scorers(records, next(iter(records[0].said)))
    return next((name for name in (wanted, benchmark.scorer, *asked) if name in asked), "") or ""


def chosen(record: ItemRecord, condition: str, scorer: str, *, yes_no: bool = False) -> int | None:
    """The chosen option, the first of equals; None where a generated answer names none."""
    if scorer == GENERATED:
        text = record.said[condition].text or ""
        return parse_yes_no(text) if yes_no else parse_choice(text, record.choices)
    scores = option_scores(record, condition, cast(Scorer, scorer))
    return None if scores is None else int(scores.argmax())


def _value(record: ItemRecord, condition: str, benchmark: Benchmark, scorer: str) -> float:
    """How right the model is, 0..1."""
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
    """The mean; of rights and wrongs as a share."""
    is_share = bool(np.isin(values, (0.0, 1.0)).all())
    return bootstrap.share(values == 1, clips) if is_share else bootstrap.mean(values, clips)


def yes_no_scores(predicted: Sequence[int], gold: Sequence[int], asked: int) -> dict[str, float]:
    """Precision, recall and F1 of yes (0), and the share of yes among all that was asked; what is undefined is 0."""
    said_yes, is_yes = np.array(predicted, int) == 0, np.array(gold, int) == 0
    both = int((said_yes & is_yes).sum())
    precision = both / int(said_yes.sum()) if said_yes.any() else 0.0
    recall = both / int(is_yes.sum()) if is_yes.any() else 0.0
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    found = {"precision": precision, "recall": recall, "f1": f1, "yes_share": float(said_yes.sum()) / asked}
    return {name: round(value, DECIMALS) for name, value in found.items()}


def _parts(first: str, rest: str, records: Sequence[ItemRecord]) -> tuple[Order, str, str]:
    """Order, mode and view of a condition's name; the controls are in the order of the headline."""
    main: Order = "question_after" if next(iter(records[0].said)).startswith("question_after") else "question_first"
    if first == "question_first" or first == "question_after":
        return first, rest, "shown"
    return main, rest or first, first


def _scorers(records: Sequence[ItemRecord], condition: str) -> list[str]:
    """Ways to read a choice that were asked for."""
    one = next((record for record in records if record.choices), None)
    if one is None:
        return []
    found: list[str] = [scorer for scorer in SCORERS if option_scores(one, condition, scorer) is not None]
    return found + ([GENERATED] if one.said[condition].text is not None else [])


def _by_group(records: Sequence[ItemRecord], values: np.ndarray, bootstrap: Bootstrap) -> dict[str, dict[str, Estimate]]:
    """By every group that has more than one value and not one for nearly every item."""
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
    """Mean of the tasks' means; tasks count alike however many questions they have."""
    names = sorted(set(tasks))
    rows = np.zeros((len(values), 2 * len(names)))
    for place, (task, value) in enumerate(zip(tasks, values, strict=True)):
        rows[place, names.index(task)] = value
        rows[place, len(names) + names.index(task)] = 1

    def mean_of_means(sums: np.ndarray) -> np.ndarray:
        return np.nanmean(sums[..., : len(names)] / sums[..., len(names) :], axis=-1)

    return bootstrap.estimate(rows, clips, mean_of_means)


def _differences(values: dict[str, np.ndarray], clips: Sequence[str], bootstrap: Bootstrap) -> list[Difference]:
    """Modes against each other in each order, and against no frames and shuffled frames in the headline's order."""
    shown = [name for name in values if name.startswith("question_")]
    main = [name for name in shown if name.split("/")[0] == shown[0].split("/")[0]]
    pairs = [(a, b) for a, b in combinations(shown, 2) if a.split("/")[0] == b.split("/")[0]]
    pairs += [(name, "blind") for name in main if "blind" in values]
    pairs += [(name, other) for name in main if (other := f"shuffled/{name.split('/')[1]}") in values]
    p_values = [sign_flip(values[a] - values[b], clips, seed=bootstrap.seed) for a, b in pairs]
    return [
        Difference(a=a, b=b, value=bootstrap.mean(values[a] - values[b], clips), p_value=p, p_holm=adjusted)
        for (a, b), p, adjusted in zip(pairs, p_values, holm(p_values), strict=True)
    ]
