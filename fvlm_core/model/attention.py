"""Causal attention over packed sequences, with or without a KV cache.

The samples of a batch stand one after another in a single sequence; each attends only to itself. On CUDA this is torch's
`varlen_attn` (bf16, Ampere or newer); on CPU, which has no such kernel, SDPA runs per sample (or once, where all are equally long).
The `PackedCache` keeps every sample's keys and values in one buffer with room to grow, so that appending copies nothing
that is already there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


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
    _segments: dict[torch.device, "Segments"] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def offsets(self) -> list[int]:
        """[N + 1] starts of the samples."""
        return [0, *accumulate(self.lengths)]

    def segments(self, device: torch.device) -> "Segments":
        """The samples as the packed kernel takes them; made once for all layers, without waiting for the device."""
        if device not in self._segments:
            starts = send(torch.tensor(self.offsets, dtype=torch.int32), device)
            self._segments[device] = Segments(starts, max(self.lengths))
        return self._segments[device]

    @property
    def cache_rows(self) -> list[int]:
        return list(range(len(self.lengths))) if self.rows is None else self.rows


class Segments(NamedTuple):
    """A layout on a device: all that a compiled layer may know of it, so that other lengths are no other graph."""

    starts: Tensor
    """int32 [N + 1]."""
    longest: int
    """Tokens of the longest sample."""


def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, segments: Segments | None, *, layer: int) -> Tensor:
    """Causal attention within every sample: query [S, H, D], key and value [S, Hkv, D] -> [S, H, D].

    `segments`: run the packed kernel. `layer`: its number, for the layout's cache.
    """
    scale = query.shape[-1] ** -0.5
    if segments is not None:
        starts, longest = segments
        return varlen_attn(query, key, value, starts, starts, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=True)  # pyright: ignore[reportReturnType]
    if layout.cache is None:
        return _attend_each(query, key, value, layout.lengths, scale)
    keys, values = layout.cache.append(layer, key, value, layout)
    outputs = []
    for row, (begin, end) in zip(layout.cache_rows, pairwise(layout.offsets), strict=True):
        start = layout.cache.starts[row]
        stop = start + layout.cache.lengths[row] + end - begin
        attention = _attend_one if end - begin == 1 else _attend
        outputs.append(attention(query[begin:end], keys[start:stop], values[start:stop], scale))
    return torch.cat(outputs)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting: from page-locked memory, which a copy may still be reading when this returns."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def has_packed_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `varlen_attn`, which is flash attention, runs there on heads of that width."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_dim % 8:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _attend_each(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float) -> Tensor:
    """Causal attention within each sample of [S, heads, D]; one call where all samples are equally long."""
    if len(set(lengths)) == 1:
        q, k, v = (part.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2) for part in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)
    parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    return torch.cat([_attend(*part, scaling) for part in parts])


def _attend_one(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """One token attends to all t of its sample: [1, H, D] x [t, Hkv, D] -> [1, H, D].

    The heads that share keys and values are several queries of one head: on a CPU, which otherwise copies keys and values for every head,
    the time for a token grows half as fast with t.
    """
    grouped = query[0].unflatten(0, (key.shape[1], -1))[None]
    out = F.scaled_dot_product_attention(grouped, key.transpose(0, 1)[None], value.transpose(0, 1)[None], scale=scaling)
    return out.flatten(1, 2)


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
