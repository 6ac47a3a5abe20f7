"""Significant gains are found and others are not; the largest size that fits; the interval of checkpoints."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvlm_core.train.paired_timing import alternate, checkpoint_interval_s, largest_that_fits, ratio_of


def test_the_median_ratios_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        first, second = np.exp(rng.normal(0, 0.3, (2, 20)))
        found = ratio_of(first.tolist(), (second / 1.2).tolist())
        hits += found.low <= 1.2 <= found.high
    assert 0.92 <= hits / 400 <= 0.99  # 95.9 % nominal for 20 pairs


def test_a_drift_of_the_machine_is_no_gain():
    """The machine gets 17 % slower: measured one after the other that would be a gain of 17 %."""
    speed = iter(np.linspace(1.0, 1.17, 40))
    first, second = alternate(lambda: float(next(speed)), lambda: float(next(speed)), pairs=20, max_s=1e9)
    found = ratio_of(first, second)
    assert found.low <= 1
    assert found.value == pytest.approx(1.0, abs=0.01)
    speed = iter(np.linspace(1.0, 1.17, 40))
    first, second = alternate(lambda: float(next(speed)), lambda: float(next(speed)) / 1.1, pairs=20, max_s=1e9)
    assert ratio_of(first, second).low > 1


def test_too_few_pairs_show_nothing():
    found = ratio_of([2.0] * 5, [1.0] * 5)
    assert (found.value, found.low, found.high) == (2.0, 0.0, math.inf)


def test_measuring_ends_when_the_time_is_spent_but_not_before_there_is_an_interval():
    first, second = alternate(lambda: 1.0, lambda: 1.0, pairs=20, max_s=0.5)
    assert len(first) == len(second) == 6


@given(st.integers(1, 300), st.integers(1, 64))
def test_the_largest_that_fits_is_found_without_trying_all(limit, start):
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    found = largest_that_fits(fits, start, most=256)
    assert found is not None
    assert found <= min(limit, 256)
    assert found > min(limit, 256) * 0.6
    assert len(tried) <= 20


def test_nothing_fits():
    assert largest_that_fits(lambda size: False, 8, most=64) is None


@given(st.floats(0.1, 100.0), st.floats(600.0, 1e6))
def test_the_advised_interval_loses_the_least_time(write_s, failure_s):
    """Against the time that is lost per second of work (Young): writing, and on average half an interval per failure."""

    def lost(interval: float) -> float:
        return write_s / interval + (interval + write_s) / 2 / failure_s

    advised = checkpoint_interval_s(write_s, failure_s)
    assert advised > 0
    if write_s < failure_s / 50:
        assert lost(advised) <= 1.02 * min(lost(advised * factor) for factor in np.geomspace(0.1, 10, 200))
