from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlm_core.data.mixture import BLOCK_SAMPLES, Mixture, apportion, hashed_bernoulli, interleave, sample_shares

SHARES = st.lists(st.integers(1, 100), min_size=1, max_size=6).map(lambda parts: [part / sum(parts) for part in parts])


@given(SHARES, st.integers(0, 5000))
def test_apportion_is_whole_and_within_one(shares, total):
    counts = apportion(shares, total)
    assert sum(counts) == total
    assert all(abs(count - share * total) < 1 for count, share in zip(counts, shares, strict=True))


@given(st.lists(st.integers(0, 200), min_size=1, max_size=6).filter(any))
def test_every_prefix_of_a_spread_is_near_its_shares(counts):
    order = interleave(counts)
    assert Counter(order.tolist()) == Counter({index: count for index, count in enumerate(counts) if count})
    for index, count in enumerate(counts):
        expected = np.arange(1, len(order) + 1) * count / len(order)
        assert np.abs(np.cumsum(order == index) - expected).max() <= len(counts)


@settings(max_examples=40, deadline=None)
@given(SHARES, st.integers(0, 3), st.integers(0, 1000))
def test_blocks_hold_exact_shares_and_sources_are_walked_in_order(shares, block, seed):
    names = [f"s{index}" for index in range(len(shares))]
    mixture = Mixture(names, shares, [[7]] * len(shares), seed)
    seen = [mixture.at(number) for number in range((block + 1) * BLOCK_SAMPLES)]
    assert Counter(source for source, _ in seen[-BLOCK_SAMPLES:]) == Counter(
        {index: count for index, count in enumerate(apportion(shares, BLOCK_SAMPLES)) if count}
    )
    for index in range(len(shares)):
        positions = [position for source, position in seen if source == index]
        assert positions == list(range(len(positions)))


@given(st.integers(1, 50), st.integers(0, 100))
def test_every_epoch_is_another_order_of_all_rows(size, seed):
    mixture = Mixture(["only"], [1.0], [[size]], seed)
    epochs = [[mixture.row(0, epoch * size + place) for place in range(size)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 8:
        assert epochs[0] != epochs[1] != epochs[2]


@given(st.integers(2, 12), st.integers(1, 4), st.integers(0, 100))
def test_a_window_of_shards_is_left_before_the_next_is_read(shards, window, seed):
    rows = [5 + shard % 3 for shard in range(shards)]
    mixture = Mixture(["only"], [1.0], [rows], seed, window=window)
    shard_of = np.repeat(np.arange(shards), rows)
    for epoch in range(2):
        order = np.array([mixture.row(0, epoch * sum(rows) + place) for place in range(sum(rows))])
        assert sorted(order) == list(range(sum(rows)))
        seen = shard_of[order]
        spans = [np.flatnonzero(seen == shard) for shard in range(shards)]
        open_at_once = [sum(span[0] <= place <= span[-1] for span in spans) for place in range(len(order))]
        assert max(open_at_once) <= window


def test_shares_of_tokens():
    """A source of long samples gets fewer of them."""
    shares = sample_shares([0.5, 0.25, 0.25], [100.0, 100.0, 25.0])
    assert shares == pytest.approx([2 / 7, 1 / 7, 4 / 7])
    tokens = np.array(shares) * [100, 100, 25]
    assert (tokens / tokens.sum()).tolist() == pytest.approx([0.5, 0.25, 0.25])


def test_coin_is_fair_and_repeatable():
    flips = [hashed_bernoulli(0.3, 7, number) for number in range(4000)]
    assert np.mean(flips) == pytest.approx(0.3, abs=0.03)
    assert flips == [hashed_bernoulli(0.3, 7, number) for number in range(4000)]
    assert not any(hashed_bernoulli(0, number) for number in range(100))
    assert all(hashed_bernoulli(1, number) for number in range(100))


def test_impossible_mixtures():
    with pytest.raises(ValueError, match="'b' has no samples"):
        Mixture(["a", "b"], [0.5, 0.5], [[3], []], 0)
    with pytest.raises(ValueError, match="below 1/1000"):
        Mixture(["a", "b"], [0.9999, 0.0001], [[3], [3]], 0)
