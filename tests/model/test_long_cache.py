"""The cache of one long sample against that of many, on the same tokens."""

import pytest
import torch

from fvlm_core.model.attention import PackedCache, PackedLayout, attend
from fvlm_core.model.long_cache import LongCache, RoundedCache

HEADS, KV_HEADS, WIDTH, LAYERS = 6, 2, 8, 2


def tokens(n: int, heads: int, seed: int) -> torch.Tensor:
    return torch.randn(n, heads, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("steps", [[1, 1, 1, 1], [5, 1, 1, 3, 1], [1, 4, 2, 1], [7, 2]])
def test_it_attends_as_the_cache_of_many_does(steps):
    """Whatever comes at a time, and after it has grown and after tokens were taken back, as after a question."""
    long, packed = LongCache(8), PackedCache([64])
    for number, n in enumerate([*steps, *steps]):
        if number == len(steps):
            long.lengths[0] = packed.lengths[0] = sum(steps) - steps[-1]
        if long.lengths[0] + n > long.starts[-1]:
            long.grow(2 * long.starts[-1])
        layouts = PackedLayout([n], long), PackedLayout([n], packed)
        for layer in range(LAYERS):
            seeds = 100 * number + 10 * layer
            query, key, value = (tokens(n, heads, seeds + part) for part, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
            found, wanted = (attend(query, key, value, layout, None, layer=layer) for layout in layouts)
            torch.testing.assert_close(found, wanted)
        long.advance(layouts[0])
        packed.advance(layouts[1])
    assert long.bytes == LAYERS * 2 * KV_HEADS * WIDTH * long.starts[-1] * 8


def test_rounded_keys_and_values_give_the_same_within_their_rounding():
    """Against float64 attention over keys and values that were rounded alike: what is left is the one query's rounding."""
    cache, exact = RoundedCache(8), PackedCache([64])
    for number, n in enumerate([5, 1, 3, 1, 1]):
        if cache.lengths[0] + n > cache.starts[-1]:
            cache.grow(2 * cache.starts[-1])
        query, key, value = (tokens(n, heads, 10 * number + part).float() for part, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
        key, value = key.bfloat16().float(), value.bfloat16().float()
        layouts = PackedLayout([n], cache), PackedLayout([n], exact)
        found = attend(query, key, value, layouts[0], None, layer=0)
        wanted = attend(query.double(), key.double(), value.double(), layouts[1], None, layer=0)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6 if n > 1 else 2e-2)
        cache.advance(layouts[0])
        exact.advance(layouts[1])
    assert cache.bytes == 2 * KV_HEADS * WIDTH * cache.starts[-1] * 2


@pytest.mark.parametrize("kind", [LongCache, RoundedCache])
def test_more_than_fits_is_refused(kind):
    long = kind(3)
    query, key = tokens(4, HEADS, 0), tokens(4, KV_HEADS, 1)
    with pytest.raises(ValueError, match="outgrows its KV cache of 3 tokens"):
        attend(query, key, key, PackedLayout([4], long), None, layer=0)
