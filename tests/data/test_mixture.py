from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlm_core.data.mixture import BLOCK_SAMPLES, Mixture, apportion, coin, deal, spread

SHARES = st.lists(st.integers(1, 100), min_size=1, max_size=6).map(lambda parts: [part / sum(parts) for part in parts])


@given(SHARES, st.integers(0, 5000))
def test_apportion_is_whole_and_within_one(shares, total):
    counts = apportion(shares, total)
    assert sum(counts) == total
    assert all(abs(count - share * total) < 1 for count, share in zip(counts, shares, strict=True))


@given(st.lists(st.integers(0, 200), min_size=1, max_size=6).filter(any))
def test_every_prefix_of_a_spread_is_near_its_shares(counts):
    order = spread(counts)
    assert Counter(order.tolist()) == Counter({index: count for index, count in enumerate(counts) if count})
    for index, count in enumerate(counts):
        expected = np.arange(1, len(order) + 1) * count / len(order)
        assert np.abs(np.cumsum(order == index) - expected).max() <= len(counts)


@settings(max_examples=40, deadline=None)
@given(SHARES, st.integers(0, 3), st.integers(0, 1000))
def test_blocks_hold_exact_shares_and_sources_are_walked_in_order(shares, block, seed):
    names = [f"s{index}" for index in range(len(shares))]
    mixture = Mixture(names, shares, [7] * len(shares), seed)
    seen = [mixture.at(number) for number in range((block + 1) * BLOCK_SAMPLES)]
    assert Counter(source for source, _ in seen[-BLOCK_SAMPLES:]) == Counter(
        {index: count for index, count in enumerate(apportion(shares, BLOCK_SAMPLES)) if count}
    )
    for index in range(len(shares)):
        positions = [position for source, position in seen if source == index]
        assert positions == list(range(len(positions)))


@given(st.integers(1, 50), st.integers(0, 100))
def test_every_epoch_is_another_order_of_all_rows(size, seed):
    mixture = Mixture(["only"], [1.0], [size], seed)
    epochs = [[mixture.row(0, epoch * size + place) for place in range(size)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 8:
        assert epochs[0] != epochs[1] != epochs[2]


@given(st.lists(st.integers(0, 100), max_size=60), st.integers(1, 8))
def test_dealing_loses_nothing_and_is_even(costs, bins):
    dealt = deal([(cost,) for cost in costs], bins)
    assert sorted(index for items in dealt for index in items) == list(range(len(costs)))
    sizes = [len(items) for items in dealt]
    assert max(sizes) - min(sizes) <= 1
    if costs:
        sums = [sum(costs[index] for index in items) for items in dealt]
        assert max(sums) - min(sums) <= 2 * max(costs)


def test_coin_is_fair_and_repeatable():
    flips = [coin(0.3, 7, number) for number in range(4000)]
    assert np.mean(flips) == pytest.approx(0.3, abs=0.03)
    assert flips == [coin(0.3, 7, number) for number in range(4000)]
    assert not any(coin(0, number) for number in range(100))
    assert all(coin(1, number) for number in range(100))


def test_impossible_mixtures():
    with pytest.raises(ValueError, match="'b' has no samples"):
        Mixture(["a", "b"], [0.5, 0.5], [3, 0], 0)
    with pytest.raises(ValueError, match="below 1/1000"):
        Mixture(["a", "b"], [0.9999, 0.0001], [3, 3], 0)
