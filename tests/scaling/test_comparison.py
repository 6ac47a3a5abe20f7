"""Verdicts against noise that is known, and against an independent reference."""

import numpy as np
import pytest
from scipy.stats import ttest_rel

from fvlm_core.scaling.comparison import NOT_MEASURED, compare_losses


def test_two_runs_with_equal_seeds_are_a_paired_t_test():
    rng = np.random.default_rng(0)
    seeds = rng.normal(0, 0.2, 6)
    base, other = 2 + seeds + rng.normal(0, 0.01, 6), 1.98 + seeds + rng.normal(0, 0.01, 6)
    found = compare_losses({"base": dict(enumerate(base)), "other": dict(enumerate(other))}, "base").differences["other"]
    reference = ttest_rel(other, base)
    interval = reference.confidence_interval()
    assert found.p_value == pytest.approx(reference.pvalue, abs=1e-6)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_noise_is_what_seeds_leave_over():
    """20 runs on 10 seeds: the scatter of seeds, ten times the noise, is taken out."""
    rng = np.random.default_rng(1)
    seeds = rng.normal(0, 0.1, 10)
    losses = {f"r{run}": {seed: 2 + seeds[seed] + rng.normal(0, 0.01) for seed in range(10)} for run in range(20)}
    found = compare_losses(losses, "r0")
    assert found.noise.value == pytest.approx(0.01, rel=0.15)
    assert "seeds as blocks" in found.method
    assert "19 comparisons" in found.method


def test_equal_runs_are_seldom_called_different():
    """Of 60 families of 10 runs that are alike, 5 % may have a finding; 9 or more have a chance of under 1 in 200."""
    rng = np.random.default_rng(2)
    families = 0
    for _ in range(60):
        losses = {f"r{run}": {seed: 2 + rng.normal(0, 0.02) for seed in range(5 if run == 0 else 2)} for run in range(11)}
        found = compare_losses(losses, "r0")
        families += any(one.p_value is not None and one.p_value < 0.05 for one in found.differences.values())
    assert families <= 8


def test_one_seed_of_all_but_the_baseline_is_compared_unpaired():
    losses = {"base": {0: 2.0, 1: 2.02, 2: 1.98}, "a": {0: 2.01}, "b": {0: 1.2}}
    found = compare_losses(losses, "base")
    assert found.noise.value == pytest.approx(0.02)
    assert "not paired" in found.method
    assert found.differences["b"].p_value is not None
    assert found.differences["b"].p_value < 0.05 < (found.differences["a"].p_value or 0)
    assert found.differences["b"].delta == pytest.approx(-0.8)


def test_one_seed_measures_no_noise():
    found = compare_losses({"base": {0: 2.0}, "a": {0: 1.0}}, "base")
    assert found.method == found.noise.reason == NOT_MEASURED
    one = found.differences["a"]
    assert (one.delta, one.low, one.p_value) == (-1.0, None, None)


def test_a_run_without_a_seed_in_common_is_compared_unpaired():
    """Two of the baseline's three seeds have diverged: blocks of seeds say nothing about the difference, whatever they leave over."""
    losses = {"base": {2: 3.001}, "a": {0: 2.900, 1: 2.902}, "b": {0: 3.100, 1: 3.101}}
    found = compare_losses(losses, "base")
    assert "not paired" in found.method
    assert {name: one.delta for name, one in found.differences.items()} == pytest.approx({"a": -0.1, "b": 0.0995})
