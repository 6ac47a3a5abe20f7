"""Causal attention over packed sequences, with or without a KV cache, plugged into transformers' Llama by name.

The samples of a batch stand one after another in a single sequence; each attends only to itself. On CUDA this is torch's
`varlen_attn` (bf16, Ampere or newer); on CPU, which has no such kernel, SDPA runs per sample (or once, where all are equally long).
The `PackedCache` keeps every sample's keys and values in one buffer with room to grow, so that appending copies nothing
that is already there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

NAME = "fvlm_packed"
"""The `attn_implementation` that the models here are built with."""


class PackedCache:
    """Keys and values of N growing samples, per layer [sum of capacities, kv_heads, head_dim]."""

    def __init__(self, capacities: Sequence[int]) -> None:
        """`capacities`: the most tokens each sample may come to."""
        self.starts = [0, *accumulate(capacities)]
        self.lengths = [0] * len(capacities)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, key: Tensor, value: Tensor, layout: "PackedLayout") -> tuple[Tensor, Tensor]:
        """Store new keys and values [S, kv_heads, head_dim] behind the old; returns the layer's whole buffers.

        The samples' lengths move on with `advance`, once all layers have appended. Raises ValueError past a capacity.
        """
        if layer not in self.layers:
            shape = (self.starts[-1], *key.shape[1:])
            self.layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self.layers[layer]
        for sample, (begin, end) in zip(layout.cache_rows, pairwise(layout.offsets), strict=True):
            place = self.starts[sample] + self.lengths[sample]
            if place + end - begin > self.starts[sample + 1]:
                raise ValueError(f"sample {sample} outgrows its KV cache of {self.starts[sample + 1] - self.starts[sample]} tokens")
            keys[place : place + end - begin] = key[begin:end]
            values[place : place + end - begin] = value[begin:end]
        return keys, values

    def advance(self, layout: "PackedLayout") -> None:
        """Count the tokens of `layout` as stored."""
        for sample, length in zip(layout.cache_rows, layout.lengths, strict=True):
            self.lengths[sample] += length

    def grow(self, capacity: int) -> None:
        """Give the only sample of this cache room for `capacity` tokens."""
        self.starts = [0, capacity]
        for layer, buffers in self.layers.items():
            keys, values = (torch.cat([part, part.new_zeros(capacity - len(part), *part.shape[1:])]) for part in buffers)
            self.layers[layer] = (keys, values)

    @property
    def bytes(self) -> int:
        """Memory of all buffers."""
        return sum(part.nbytes for pair in self.layers.values() for part in pair)


@dataclass(frozen=True)
class PackedLayout:
    """Where each sample's new tokens stand in the packed sequence."""

    lengths: list[int]
    """New tokens of each sample."""
    cache: PackedCache | None = None
    rows: list[int] | None = None
    """Which samples of the cache these are; all, in order, by default."""
    _cu_seqlens: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def offsets(self) -> list[int]:
        """[N + 1] starts of the samples."""
        return [0, *accumulate(self.lengths)]

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """`offsets` as int32 [N + 1] on a device; made once for all layers, without waiting for the device."""
        if device not in self._cu_seqlens:
            self._cu_seqlens[device] = torch.tensor(self.offsets, dtype=torch.int32).to(device, non_blocking=True)
        return self._cu_seqlens[device]

    @property
    def cache_rows(self) -> list[int]:
        return list(range(len(self.lengths))) if self.rows is None else self.rows


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedLayout,
    scaling: float,
    **_unused: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, S, D], key and value [1, Hkv, S, D] -> [1, S, H, D]."""
    # rotary embeddings lift queries and keys to fp32 under autocast; values have kept the precision that was asked for
    query, key, value = (part[0].transpose(0, 1).to(value.dtype) for part in (query, key, value))  # [S, heads, D]
    if packed.cache is None:
        if _has_packed_kernel(query):
            starts = packed.cu_seqlens(query.device)
            longest = max(packed.lengths)
            out = varlen_attn(query, key, value, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=True)
            return out[None], None  # pyright: ignore[reportOptionalSubscript, reportCallIssue, reportArgumentType]
        return _attend_each(query, key, value, packed.lengths, scaling)[None], None
    keys, values = packed.cache.append(module.layer_idx, key, value, packed)
    outputs = []
    for row, (begin, end) in zip(packed.cache_rows, pairwise(packed.offsets), strict=True):
        start = packed.cache.starts[row]
        stop = start + packed.cache.lengths[row] + end - begin
        outputs.append(_attend(query[begin:end], keys[start:stop], values[start:stop], scaling))
    return torch.cat(outputs)[None], None


def _has_packed_kernel(query: Tensor) -> bool:
    """Whether `varlen_attn`, which is flash attention, takes such queries [S, heads, D]."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or query.shape[-1] % 8:
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def _attend_each(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float) -> Tensor:
    """Causal attention within each sample of [S, heads, D]; one call where all samples are equally long."""
    if len(set(lengths)) == 1:
        q, k, v = (part.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2) for part in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)
    parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    return torch.cat([_attend(*part, scaling) for part in parts])


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """The last len(query) tokens of one sample attend causally to all its tokens: [s, H, D] x [t, Hkv, D] -> [s, H, D]."""
    new, known = len(query), len(key)
    mask = None
    if 1 < new < known:
        mask = torch.ones(new, known, dtype=torch.bool, device=query.device).tril(known - new)
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
    causal = new > 1 and mask is None
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=True)
    return out[0].transpose(0, 1)


AttentionInterface.register(NAME, packed_attention)
