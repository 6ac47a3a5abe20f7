"""KV caches for a single long sample on CPU: a stream, in which each frame adds one token that attends to all earlier tokens.

With thousands of tokens, this attention is the main cost of a frame beside its encoding. The lower bound is reading all keys and values
once: 166 MB after 3,600 tokens at SmolLM2-135M's shapes. SDPA on keys stored token by token takes 1.9 times as long as that. `LongCache`
stores keys and values in the order in which two plain matrix products read them, which take 1.4 times as long. `RoundedCache` stores
bfloat16, half the bytes; SDPA, which accumulates in fp32, then takes .6 of the two products' time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fvlm_core.model.attention import PackedCache, PackedLayout, attend_to_cached


class LongCache(PackedCache):
    """Per layer, keys [kv_heads, head_dim, capacity] and values [kv_heads, capacity, head_dim]."""

    def __init__(self, capacity: int) -> None:
        super().__init__([capacity])

    def held(self, layer: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Views of tokens `begin` to `end`: keys [kv_heads, head_dim, n], values [kv_heads, n, head_dim]."""
        keys, values = self.layers[layer]
        return keys[..., begin:end], values[:, begin:end]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float) -> Tensor:
        """As `PackedCache.attend`: query [S, H, D], key and value [S, kv_heads, D] -> [S, H, D]. Raises ValueError past the capacity."""
        (known,) = self.lengths
        keys, values = self._store(layer, key, value)
        if known == 0:
            return attend_to_cached(query, key, value, scaling)
        if len(query) > 1:
            keys, values = self._by_token(keys, values)
            return attend_to_cached(query, keys.to(query.dtype), values.to(query.dtype), scaling)
        return self._one(query, keys, values, scaling)

    def _one(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Attention from a single token [1, H, D] to keys and values in the layout of `held`."""
        # query heads that share a KV head become the rows of one matrix product
        scores = torch.bmm(query[0].unflatten(0, (len(keys), -1)) * scaling, keys)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
        return torch.bmm(weights, values).flatten(0, 1)[None]

    def _store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [S, kv_heads, head_dim]; return all stored ones in the layout of `held`."""
        (known,), new, (*_, capacity) = self.lengths, len(key), self.starts
        if known + new > capacity:
            raise ValueError(f"the sample outgrows its KV cache of {capacity} tokens")
        if layer not in self.layers:
            self.layers[layer] = self._buffers(value, value.shape[1], value.shape[2])
        for buffer, part in zip(self.held(layer, known, known + new), self._turned(key, value), strict=True):
            buffer.copy_(part)
        return self.held(layer, 0, known + new)

    def _turned(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Convert new keys and values [S, kv_heads, head_dim] to the layout of `held`."""
        return key.permute(1, 2, 0), value.transpose(0, 1)

    def _by_token(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Convert keys and values from the layout of `held` to [n, kv_heads, head_dim]."""
        return keys.permute(2, 0, 1).contiguous(), values.transpose(0, 1)

    def grow(self, capacity: int) -> None:
        """Reallocate the buffers for `capacity` tokens."""
        (length,) = self.lengths
        held = {layer: self.held(layer, 0, length) for layer in self.layers}
        self.starts = [0, capacity]
        for layer, parts in held.items():
            self.layers[layer] = self._buffers(parts[1], len(parts[1]), parts[1].shape[2])
            for to, old in zip(self.held(layer, 0, length), parts, strict=True):
                to.copy_(old)

    def _buffers(self, like: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor]:
        # empty, not zeros: the system only allocates pages once they are written
        return like.new_empty(heads, width, self.starts[-1]), like.new_empty(heads, self.starts[-1], width)


class RoundedCache(LongCache):
    """Per layer, keys and values [kv_heads, capacity, head_dim] rounded to bfloat16."""

    def held(self, layer: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Views of tokens `begin` to `end`: keys and values [kv_heads, n, head_dim]."""
        keys, values = self.layers[layer]
        return keys[:, begin:end], values[:, begin:end]

    def _one(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        row = query.to(keys.dtype).transpose(0, 1)[None]  # [1, H, 1, D]
        read = F.scaled_dot_product_attention(row, keys[None], values[None], scale=scaling, enable_gqa=True)
        return read[0].transpose(0, 1).to(query.dtype)

    def _turned(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return key.transpose(0, 1), value.transpose(0, 1)

    def _by_token(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._turned(keys, values)

    def _buffers(self, like: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor]:
        shape = heads, self.starts[-1], width
        return like.new_empty(shape, dtype=torch.bfloat16), like.new_empty(shape, dtype=torch.bfloat16)
