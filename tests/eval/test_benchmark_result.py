"""What records add up to, against direct computation."""

import numpy as np
import pytest

from fvlm_core.eval.benchmark_result import benchmark_result
from fvlm_core.eval.benchmark_tables import benchmark_tables
from fvlm_core.eval.benchmarks import benchmark
from fvlm_core.eval.benchmarks.benchmark import Loaded
from fvlm_core.eval.parts.benchmarks import BenchmarksResult, metric
from fvlm_core.eval.records import ConditionOutput, ItemRecord, option_scores
from fvlm_core.eval.stats import Bootstrap

MODES = ("coarse_only", "coarse_fine", "autoregressive")
NAMES = [f"{order}/{mode}" for order in ("question_first", "question_after") for mode in MODES]
CONTROLS = [*(f"shuffled/{mode}" for mode in MODES), "blind", "random_query", "question_query"]


def said(place: int, choices: int, letters: bool = True) -> ConditionOutput:
    """A model that prefers one option, by its letter and by its text."""
    scores = [-1.0 if number == place else -3.0 for number in range(choices)]
    return ConditionOutput(letters=scores if letters else [], options=[(2 * score, 2, -0.1) for score in scores])


def records(n: int, seed: int, *, tasks: list[str], choices: int = 4) -> list[ItemRecord]:
    """Three questions a clip; a mode is right with its own probability."""
    rng = np.random.default_rng(seed)
    skill = dict.fromkeys([*NAMES, *CONTROLS], 0.25) | {"question_first/coarse_fine": 0.9, "question_first/autoregressive": 0.88}
    found = []
    for number in range(n):
        gold = int(rng.integers(choices))
        asked = {name: said(gold if rng.random() < p else int(rng.integers(choices)), choices) for name, p in skill.items()}
        groups = {"task": tasks[number % len(tasks)] if number else tasks[-1], "clip": f"c{number // 3}"}
        found.append(
            ItemRecord(id=str(number), clip=f"c{number // 3}", groups=groups, choices=["w"] * choices, gold=gold, frames=8, said=asked)
        )
    return found


def result_of(name: str, found: list[ItemRecord]):
    return benchmark_result(Loaded(benchmark(name), [], len(found), {}, {}), found, Bootstrap(200, 0), fps=1.0, frame_px=42)


def rights(found: list[ItemRecord], name: str) -> np.ndarray:
    return np.array([int(np.argmax(record.said[name].letters)) == record.gold for record in found])


def test_accuracy_controls_groups_and_letters():
    found = records(240, 0, tasks=["count", "order", "plot"])
    result = result_of("videomme", found)
    assert set(result.conditions) == {*NAMES, *CONTROLS}
    assert (result.questions, result.clips, result.chance, result.scorer) == (240, 80, 0.25, "letter")
    for name, one in result.conditions.items():
        right = rights(found, name)
        assert one.score.value == pytest.approx(right.mean(), abs=1e-6)
        assert one.score.exact, "80 clips are few"
        assert sum(one.positions) == 240
        for task, estimate in one.by_group["task"].items():
            of_task = np.array([record.groups["task"] == task for record in found])
            assert (estimate.value, estimate.count) == (pytest.approx(right[of_task].mean(), abs=1e-6), of_task.sum())
    gold = np.bincount([record.gold or 0 for record in found])
    assert (result.majority, result.gold_positions) == (pytest.approx(gold.max() / 240), gold.tolist())


def test_baselines_are_over_the_same_questions_as_the_score():
    """30 questions with four choices and 10 open ones: guessing is right in 7.5 of 40, the best constant letter in its own of 40."""
    choices = records(30, 0, tasks=["t"])
    names = list(choices[0].said)
    answered = dict.fromkeys(names, ConditionOutput(text="5"))
    opened = [ItemRecord(id=f"o{n}", clip=f"o{n}", groups={}, answers=["5"], frames=8, said=answered) for n in range(10)]
    result = result_of("own", [*choices, *opened])
    gold = np.bincount([record.gold or 0 for record in choices])
    assert (result.chance, result.majority) == (30 / 4 / 40, pytest.approx(gold.max() / 40))
    score = result.conditions["question_first/coarse_fine"].score.value
    assert score == pytest.approx((option_rights(choices, "question_first/coarse_fine") + 10) / 40, abs=1e-6)
    assert "10 questions are open: chance and the most frequent letter count them as wrong" in benchmark_tables(result)[0].note
    assert "are open" not in benchmark_tables(result_of("own", choices))[0].note
    assert result_of("own", opened).chance is None


def option_rights(found: list[ItemRecord], name: str) -> int:
    """Questions that are right by the headline scorer of `own`."""
    scorer = benchmark("own").scorer
    scores = [option_scores(record, name, scorer) for record in found]
    return sum(int(np.argmax(one)) == record.gold for one, record in zip(scores, found, strict=True) if one is not None)


def test_the_macro_mean_counts_tasks_alike():
    """M-Avg: the mean of the tasks' accuracies, however many questions each has."""
    found = records(120, 1, tasks=["a", "a", "a", "a", "b", "c"])
    one = result_of("mlvu", found).conditions["question_first/coarse_fine"]
    right, tasks = rights(found, "question_first/coarse_fine"), np.array([record.groups["task"] for record in found])
    assert one.macro is not None
    assert one.headline.value == pytest.approx(np.mean([right[tasks == task].mean() for task in "abc"]), abs=1e-6)
    assert one.headline.value != pytest.approx(right.mean(), abs=1e-6)
    assert one.macro.low < one.macro.value < one.macro.high


def test_differences_are_those_of_the_headline_where_tasks_count_alike():
    """One large task, in which a mode is better, and four small ones in which it is worse: worse by the headline, better by questions."""
    sizes = {"large": 60, "b": 12, "c": 12, "d": 12, "e": 12}
    a, b = "question_first/coarse_only", "question_first/coarse_fine"
    right = {a: {"large": 24, "b": 8, "c": 9, "d": 8, "e": 9}, b: {"large": 51, "b": 3, "c": 2, "d": 4, "e": 3}}
    found = []
    for task, size in sizes.items():
        for n in range(size):
            name = f"{task}{n}"
            scores = {mode: said(int(n >= right[mode][task]), 4) for mode in (a, b)}
            groups = {"task": task, "clip": name}
            found.append(ItemRecord(id=name, clip=name, groups=groups, choices=["w"] * 4, gold=0, frames=8, said=scores))
    result = result_of("mlvu", found)
    (difference,) = result.differences
    headlines = [result.conditions[name].headline.value for name in (a, b)]
    assert difference.value.value == pytest.approx(headlines[0] - headlines[1], abs=2e-6)
    assert difference.value.value > 0 > rights(found, a).mean() - rights(found, b).mean()
    assert 0 < difference.value.low < difference.value.value < difference.value.high
    weights = np.array([1 / (len(sizes) * sizes[record.groups["task"]]) for record in found])
    weighted = weights * (rights(found, a).astype(float) - rights(found, b))
    signs = np.random.default_rng(5).choice([-1, 1], (20_000, len(found)))
    p = np.mean(abs(signs @ weighted) >= abs(weighted.sum()) - 1e-9)
    assert difference.p_value == pytest.approx(p, abs=0.01)
    assert "every task has the same weight" in benchmark_tables(result)[-1].note


def test_differences_are_tested_and_noise_is_called_noise():
    found = records(240, 2, tasks=["t"])
    result = result_of("videomme", found)
    by = {(one.a, one.b): one for one in result.differences}
    clear = by["question_first/coarse_only", "question_first/coarse_fine"]
    assert clear.value.value == pytest.approx(
        rights(found, "question_first/coarse_only").mean() - rights(found, "question_first/coarse_fine").mean(), abs=1e-6
    )
    assert not clear.noise
    assert by["question_first/coarse_fine", "question_first/autoregressive"].noise
    assert by["question_after/coarse_only", "question_after/coarse_fine"].noise
    assert not by["question_first/coarse_fine", "blind"].noise
    assert all(one.p_holm >= one.p_value for one in result.differences)
    table = benchmark_tables(result)[-1]
    assert {row[-1] for row in table.rows} == {"differs", "within noise"}


def test_pope_has_precision_recall_f1_and_the_share_of_yes_of_the_predictions():
    """A model that always says yes: accuracy, F1 and share of yes are known."""
    found = [
        ItemRecord(
            id=str(n),
            clip=f"c{n}",
            groups={"task": ("random", "popular")[n % 2]},
            choices=["yes", "no"],
            gold=n % 2,
            said={"question_first/coarse_only": said(0, 2, letters=False)},
        )
        for n in range(60)
    ]
    one = result_of("pope", found).conditions["question_first/coarse_only"]
    assert one.score.value == 0.5
    assert one.yes_no == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3, abs=1e-6), "yes_share": 1.0}
    assert one.positions == [60, 0]


def test_open_answers_are_scored_by_the_benchmarks_own_metric():
    found = [
        ItemRecord(
            id=str(n),
            clip=str(n),
            groups={"task": "t"},
            answers=["kitten"],
            said={"question_first/coarse_only": ConditionOutput(text=text)},
        )
        for n, text in enumerate(["kitten", "sitting", "dog"])
    ]
    result = result_of("docvqa", found)
    assert result.metric == "anls"
    assert result.conditions["question_first/coarse_only"].score.value == pytest.approx((1 + 4 / 7) / 3, abs=1e-6)
    assert result.chance is None


def test_generated_answers_that_name_no_choice_are_wrong_and_counted():
    texts = ["B", "(A) w", "I cannot say", "C."]
    found = [
        ItemRecord(
            id=str(n),
            clip=str(n),
            groups={},
            choices=["w", "x", "y"],
            gold=1,
            said={"question_first/coarse_only": ConditionOutput(text=text)},
        )
        for n, text in enumerate(texts)
    ]
    one = result_of("videomme", found).conditions["question_first/coarse_only"]
    assert (one.score.value, one.unparsed, one.positions) == (0.25, 1, [1, 1, 1])


def test_the_headline_is_read_off_as_asked_for_or_as_the_benchmark_does():
    options = [(-1.0, 1, -0.1), (-3.0, 1, -0.1), (-3.0, 1, -0.1)]
    one = ConditionOutput(letters=[-2.0, -1.0, -2.0], options=options)
    found = [
        ItemRecord(id=str(n), clip=str(n), groups={}, choices=["w", "x", "y"], gold=n % 2, said={"question_first/coarse_only": one})
        for n in range(3)
    ]
    all_of = Loaded(benchmark("videomme"), [], len(found), {}, {})
    for wanted, scorer, accuracy in ((None, "letter", 1 / 3), ("mean", "mean", 2 / 3), ("pmi", "letter", 1 / 3)):
        result = benchmark_result(all_of, found, Bootstrap(20, 0), fps=1.0, frame_px=42, scorer=wanted)
        assert result.scorer == scorer, "pmi was not asked for"
        assert result.conditions["question_first/coarse_only"].headline.value == pytest.approx(accuracy, abs=1e-6)


def test_ways_to_read_a_choice():
    record = ItemRecord(
        id="",
        clip="",
        groups={},
        unconditional=[-3.0, -9.0],
        said={"c": ConditionOutput(letters=[-2.0, -1.0], options=[(-2.0, 1, -1.0), (-6.0, 4, -0.5)])},
    )
    found = {scorer: option_scores(record, "c", scorer) for scorer in ("letter", "sum", "mean", "pmi")}
    assert found["letter"].tolist() == [-2, -1]
    assert found["sum"].tolist() == [-3, -6.5]
    assert found["mean"].tolist() == pytest.approx([(-2 + 1.6) * 1, (-1.5 + 1.6) * 2])
    assert found["pmi"].tolist() == pytest.approx([0, 2.5 / np.sqrt(5)])


def test_results_are_kept_and_shown():
    result = BenchmarksResult(benchmarks={"videomme": result_of("videomme", records(60, 3, tasks=["a", "b"]))})
    assert BenchmarksResult.model_validate_json(result.model_dump_json()) == result
    (line,) = result.headline()
    assert (line.name, line.hub_type, list(line.values)) == ("Video-MME", "accuracy", list(MODES))
    assert line == metric(result.benchmarks["videomme"])
    assert set(line.baselines) == {"chance", "constant", "no frames"}
    assert line.dataset is not None
    assert line.dataset.type == "lmms-eval/Video-MME"
    titles = [table.title for table in result.tables()]
    assert titles == [
        "Video-MME",
        "Video-MME by scoring method",
        "Video-MME by question order",
        "Video-MME by task",
        "Video-MME, differences",
    ]
    first = {row[0]: row for row in result.tables()[0].rows}
    assert "random queries" in first
    assert "no frames (blind)" in first
    assert "letters chosen" in result.tables()[0].head
