"""Intervals and tests against direct computation and against scipy."""

from itertools import product

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.stats import beta, binomtest, norm, permutation_test, t, ttest_rel

from fvlm_core.eval.stats import Bootstrap, holm, over_seeds, sign_flip

values = st.lists(st.floats(-100, 100, allow_nan=False), min_size=1, max_size=40)


@given(values, st.integers(1, 5), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_the_interval_holds_the_mean(numbers: list[float], clips: int, seed: int):
    estimate = Bootstrap(200, seed).mean(numbers, [f"clip{i % clips}" for i in range(len(numbers))])
    assert estimate.value == pytest.approx(np.mean(numbers), abs=1e-6)
    assert estimate.low <= estimate.value <= estimate.high
    assert estimate.n == min(clips, len(numbers))
    assert estimate.count == len(numbers)


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(1, 30)), min_size=1, max_size=30))
@settings(deadline=None, max_examples=60)
def test_weighted_mean_is_sum_over_sum(rows: list[tuple[float, int]]):
    estimate = Bootstrap(50, 0).weighted_mean(np.array(rows, float), [str(i) for i in range(len(rows))])
    assert estimate.value == pytest.approx(sum(s for s, _ in rows) / sum(w for _, w in rows), abs=1e-6)
    assert estimate.count == sum(w for _, w in rows)


def test_width_is_that_of_the_normal_approximation():
    rng = np.random.default_rng(0)
    right = rng.random(2000) < 0.3
    estimate = Bootstrap(2000, 0).mean(right, [str(i) for i in range(2000)])
    half = norm.ppf(0.975) * right.std() / np.sqrt(2000)
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.08)


@pytest.mark.parametrize("clips", [5, 8])
def test_the_interval_of_few_clips_is_nearly_a_95_percent_one(clips: int):
    """Plain percentiles hold the truth in .84 and .88 of such samples."""
    rng, samples = np.random.default_rng(0), 500
    estimates = [Bootstrap(500, seed).mean(rng.normal(size=clips), [str(i) for i in range(clips)]) for seed in range(samples)]
    assert np.mean([one.low <= 0 <= one.high for one in estimates]) > 0.90


def test_questions_about_one_clip_are_one_fact():
    right = np.repeat(np.random.default_rng(0).random(50) < 0.5, 9)
    apart = Bootstrap(500, 0).mean(right, [str(i) for i in range(450)])
    together = Bootstrap(500, 0).mean(right, [str(i // 9) for i in range(450)])
    assert together.high - together.low > 2 * (apart.high - apart.low)


def crossed(clips: int, digits: int, frames: int, rng: np.random.Generator) -> tuple[list[str], list[str], np.ndarray]:
    """Clips that draw their digits from a small stock: names of clip and digit by row, and each row's digit."""
    drawn = rng.integers(digits, size=clips * frames)
    return [str(i // frames) for i in range(clips * frames)], drawn.astype(str).tolist(), drawn


def test_rows_that_share_a_digit_are_one_fact_too():
    """Each digit is always right or always wrong: the interval is as wide as if every digit had been asked for once."""
    rng = np.random.default_rng(0)
    clips, names, drawn = crossed(1000, 100, 3, rng)
    readable = rng.random(100) < 0.8
    one_way, two_way = (Bootstrap(1000, 0).mean(readable[drawn], clips), Bootstrap(1000, 0).two_way(readable[drawn], clips, names))
    assert two_way.value == one_way.value == pytest.approx(readable[drawn].mean(), abs=1e-6)
    assert (two_way.n, two_way.count, one_way.n) == (100, 3000, 1000)
    width = 2 * norm.ppf(0.975) * readable.std() / np.sqrt(100)
    assert two_way.high - two_way.low == pytest.approx(width, rel=0.15)
    assert one_way.high - one_way.low < width / 3
    with pytest.raises(ValueError, match="nothing to estimate"):
        Bootstrap(10, 0).two_way([], [], [])


def test_the_interval_over_two_factors_holds_the_truth():
    """Digits differ in how well they are read; intervals over clips alone miss the mean over all writers' digits too often."""
    rng, one_way, two_way = np.random.default_rng(1), [], []
    for seed in range(200):
        clips, names, drawn = crossed(150, 40, 3, rng)
        right = rng.random(len(drawn)) < rng.beta(4, 1, size=40)[drawn]
        one, two = Bootstrap(200, seed).mean(right, clips), Bootstrap(200, seed).two_way(right, clips, names)
        one_way.append(one.low <= 0.8 <= one.high)
        two_way.append(two.low <= 0.8 <= two.high)
    assert np.mean(two_way) > 0.93
    assert np.mean(one_way) < 0.85


def test_differences_over_seeds_are_paired_t_tests():
    ours = {0: 0.338, 1: 0.613, 2: 0.715, 3: 0.6}
    others = {"a": {0: 0.219, 1: 0.266, 2: 0.334}, "b": {0: 0.113, 1: 0.09, 2: 0.139, 3: 0.1}, "c": dict(ours), "one": {1: 0.5}}
    found = over_seeds(ours, others)
    assert found.keys() == {"a", "b", "c"}, "a single seed says nothing about seeds"
    raw = {}
    for name in "ab":
        seeds = list(others[name])
        test = ttest_rel([ours[seed] for seed in seeds], [others[name][seed] for seed in seeds])
        interval, raw[name] = test.confidence_interval(0.95), test.pvalue
        assert (found[name].low, found[name].high) == pytest.approx((interval.low, interval.high))
        assert found[name].by_seed == {seed: pytest.approx(ours[seed] - others[name][seed]) for seed in seeds}
        assert found[name].mean == pytest.approx(np.mean(list(found[name].by_seed.values())))
    assert raw["b"] < raw["a"]
    assert found["b"].p_holm == pytest.approx(3 * raw["b"], abs=1e-6)
    assert found["a"].p_holm == pytest.approx(2 * raw["a"], abs=1e-6)
    assert (found["c"].low, found["c"].high, found["c"].p_holm) == (0, 0, 1)


def test_nothing_is_no_estimate():
    with pytest.raises(ValueError, match="nothing to estimate"):
        Bootstrap(10, 0).mean([], [])


@given(st.integers(1, 40), st.data())
@settings(deadline=None, max_examples=60)
def test_the_exact_interval_is_scipys_where_every_clip_is_one_question(n: int, data: st.DataObject):
    right = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    estimate = Bootstrap(20, 0).share(right, [str(i) for i in range(n)])
    expected = binomtest(sum(right), n).proportion_ci(0.95, method="exact")
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=2e-6)
    assert estimate.exact


def test_the_exact_interval_counts_clips_where_all_questions_of_a_clip_agree():
    """Ten clips of nine equal answers: ten questions, less one for the mean, times the squared ratio of the t quantiles."""
    right = np.repeat([True] * 6 + [False] * 4, 9)
    estimate = Bootstrap(20, 0).share(right, [str(i // 9) for i in range(90)])
    worth = 9 * (t.ppf(0.975, 89) / t.ppf(0.975, 9)) ** 2
    expected = beta.ppf(0.025, 0.6 * worth, 0.4 * worth + 1), beta.ppf(0.975, 0.6 * worth + 1, 0.4 * worth)
    assert (estimate.low, estimate.high) == pytest.approx(expected, abs=1e-6)
    none = Bootstrap(20, 0).share([False] * 90, [str(i // 9) for i in range(90)])
    assert (none.low, none.high) == (0, pytest.approx(binomtest(0, 10).proportion_ci(0.95, method="exact").high, abs=1e-6))


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=10))
@settings(deadline=None, max_examples=60)
def test_sign_flips_of_few_clips_are_all_tried(differences: list[int]):
    totals = [abs(sum(a * b for a, b in zip(signs, differences, strict=True))) for signs in product((1, -1), repeat=len(differences))]
    expected = np.mean([total >= abs(sum(differences)) for total in totals])
    assert sign_flip(differences, [str(i) for i in range(len(differences))]) == pytest.approx(expected, abs=1e-6)


def test_sign_flips_of_many_clips_are_scipys_permutation_test():
    differences = np.random.default_rng(1).integers(-1, 2, 60) + 0.25
    theirs = permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(0), alternative="two-sided"
    )
    assert sign_flip(differences, [str(i) for i in range(60)]) == pytest.approx(theirs.pvalue, abs=0.012)


def test_the_clustered_test_holds_its_level_where_mcnemars_does_not():
    """Two methods that are equally good, nine questions a clip, whose difference depends on the clip."""
    rng = np.random.default_rng(0)
    clips = [str(i // 9) for i in range(40 * 9)]
    clustered, unclustered = [], []
    for _ in range(400):
        lean = rng.normal(0, 0.4, (40, 1))
        uniform = rng.random((40, 9))
        a, b = uniform < 0.5 + lean / 2, rng.permuted(uniform, axis=1) < 0.5 - lean / 2
        difference = a.astype(float).ravel() - b.ravel()
        clustered.append(sign_flip(difference, clips) < 0.05)
        only_a, only_b = int((difference > 0).sum()), int((difference < 0).sum())
        unclustered.append(binomtest(only_a, only_a + only_b).pvalue < 0.05)
    assert np.mean(clustered) < 0.075, "0.05, plus two and a half standard errors"
    assert np.mean(unclustered) > 0.1


@given(st.lists(st.floats(0, 1, allow_nan=False), min_size=1, max_size=8))
def test_holm_is_step_down_bonferroni(p_values: list[float]):
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
            if p_values[place] > level / (len(p_values) - rank):
                break
            rejected.add(place)
        assert {place for place, p in enumerate(adjusted) if p <= level - 1e-6} <= rejected
        assert rejected <= {place for place, p in enumerate(adjusted) if p <= level + 1e-6}
