import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlm_core.data.balancing import balance

COST = st.tuples(st.floats(0, 1.2), st.floats(0.001, 1.2))


@settings(deadline=None)
@given(st.lists(COST, min_size=4, max_size=40), st.integers(1, 4))
def test_nothing_is_lost_and_no_budget_is_broken(costs, ranks):
    dealt = balance(costs, ranks)
    assert sorted(item for rank in dealt for items in rank for item in items) == list(range(len(costs)))
    assert len(dealt) == ranks
    assert len({len(rank) for rank in dealt}) == 1
    each = len(dealt[0])
    for items in (items for rank in dealt for items in rank):
        assert items == sorted(items)
        assert items
        total = np.array(costs)[items].sum(0)
        # but where an item alone is above, or there are as many micro-batches as there can be
        assert (total <= 1 + 1e-6).all() or len(items) == 1 or each == len(costs) // ranks
    assert each >= min(len(costs) // ranks, np.ceil(np.array(costs).clip(max=1).sum(0).max() / ranks - 1e-6))


def test_what_fits_at_once_is_one_micro_batch():
    assert balance([(0.1, 0.2)] * 5, 1) == [[[0, 1, 2, 3, 4]]]


def test_an_item_above_the_budget_is_alone():
    assert balance([(0.1, 0.1), (3.0, 0.1), (0.1, 0.1)], 1) == [[[1], [0, 2]]]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_compute_alike_in_every_micro_batch(ranks):
    """A mixture as of stage 3: videos, images and texts, 32 samples a rank."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        kind = rng.choice(3, size=32 * ranks, p=[0.46, 0.34, 0.2])
        frames = np.where(kind == 0, rng.integers(4, 65, len(kind)), np.where(kind == 1, 1, 0))
        tokens = frames * np.where(kind == 1, 8, 1) + rng.integers(30, 600, len(kind))
        dealt = balance(np.stack([frames / 512, tokens / 8192], 1), ranks)
        for frame_cost in (5, 15, 45):  # tokens' worth: what it is depends on the models
            cost = frame_cost * frames + tokens
            sums = np.array([[cost[items].sum() for items in rank] for rank in dealt])
            totals = sums.sum(1)
            assert (totals.max() - totals.min()) / totals.mean() <= 0.03
