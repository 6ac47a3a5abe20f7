"""Intervals and tests against direct computation and against scipy."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.stats import binom, norm

from fvlm_core.eval.stats import Bootstrap, mcnemar

values = st.lists(st.floats(-100, 100, allow_nan=False), min_size=1, max_size=40)
counts = st.integers(0, 60)


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


def test_questions_about_one_clip_are_one_fact():
    right = np.repeat(np.random.default_rng(0).random(50) < 0.5, 9)
    apart = Bootstrap(500, 0).mean(right, [str(i) for i in range(450)])
    together = Bootstrap(500, 0).mean(right, [str(i // 9) for i in range(450)])
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_nothing_is_no_estimate():
    with pytest.raises(ValueError, match="nothing to estimate"):
        Bootstrap(10, 0).mean([], [])


@given(counts, counts)
def test_mcnemar_is_symmetric_and_exact(a: int, b: int):
    assert mcnemar(a, b) == mcnemar(b, a)
    expected = min(1.0, 2 * binom.cdf(min(a, b), a + b, 0.5)) if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, abs=1e-6)
