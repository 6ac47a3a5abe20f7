"""Causal attention over packed sequences, with or without a KV cache.

The samples of a batch stand one after another in a single sequence; each attends only to itself. On CUDA this is flash attention
(bf16, Ampere or newer), with a cache too; on CPU, which has no such kernel, SDPA runs per sample (or once, where all are equally long).
The `PackedCache` keeps every sample's keys and values in one buffer with room to grow, so that appending copies
nothing that is already there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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
        places = layout.places(key.device)
        for buffer, new in zip(self.layers[layer], (key, value), strict=True):
            buffer.index_copy_(0, places, new)
        return self.layers[layer]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, layout: "PackedLayout", scaling: float) -> Tensor:
        """Store new keys and values, and let their queries [S, H, D] attend to all of their samples, without the packed kernel."""
        keys, values = self.append(layer, key, value, layout)
        return _attend_cached(query, keys, values, layout, self, scaling)

    def advance(self, layout: "PackedLayout") -> None:
        """Count the tokens of `layout` as stored."""
        for sample, length in zip(layout.cache_rows, layout.lengths, strict=True):
            self.lengths[sample] += length
        layout.forget()

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
    _places: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def offsets(self) -> list[int]:
        """[N + 1] starts of the samples."""
        return [0, *accumulate(self.lengths)]

    def segments(self, device: torch.device) -> "Segments":
        """The samples as the packed kernel takes them; made once for all layers, without waiting for the device."""
        if device not in self._segments:
            lengths, known = self.lengths, None
            if self.cache is not None:
                lengths = [0] * len(self.cache.lengths)  # of all samples of the cache: those that are not here have no queries
                for row, length in zip(self.cache_rows, self.lengths, strict=True):
                    lengths[row] = length
                stored = [old + new for old, new in zip(self.cache.lengths, lengths, strict=True)]
                known = Known(_int32(self.cache.starts, device), _int32(stored, device), max(stored))
            starts = _int32([0, *accumulate(lengths)], device)
            self._segments[device] = Segments(starts, max(lengths), known)
        return self._segments[device]

    def places(self, device: torch.device) -> Tensor:
        """int64 [S]: where the new tokens go in the cache's buffers. Raises ValueError past a capacity."""
        if device not in self._places:
            assert self.cache is not None
            places = []
            for row, length in zip(self.cache_rows, self.lengths, strict=True):
                start, end = self.cache.starts[row : row + 2]
                first = start + self.cache.lengths[row]
                if first + length > end:
                    raise ValueError(f"sample {row} outgrows its KV cache of {end - start} tokens")
                places.append(torch.arange(first, first + length))
            self._places[device] = send(torch.cat(places), device)
        return self._places[device]

    def forget(self) -> None:
        """Call when the cache has moved on: what was made of its lengths is no longer true."""
        self._segments.clear()
        self._places.clear()

    @property
    def cache_rows(self) -> list[int]:
        return list(range(len(self.lengths))) if self.rows is None else self.rows

    @property
    def packable(self) -> bool:
        """Whether the packed kernel can take it: from a cache, samples in its order and without gradients."""
        return self.cache is None or (not torch.is_grad_enabled() and self.cache_rows == sorted(self.cache_rows))


class Known(NamedTuple):
    """What a cache holds of its samples, the new tokens included."""

    starts: Tensor
    """int32 [N + 1]: of the samples' buffers."""
    lengths: Tensor
    """int32 [N]: tokens stored."""
    longest: int


class Segments(NamedTuple):
    """A layout on a device: all that a compiled layer may know of it, so that other lengths are no other graph."""

    starts: Tensor
    """int32 [N + 1]: of the samples' new tokens."""
    longest: int
    """New tokens of the longest sample."""
    known: Known | None
    """With a cache, whose samples these are."""


def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, segments: Segments | None, *, layer: int) -> Tensor:
    """Causal attention within every sample: query [S, H, D], key and value [S, Hkv, D] -> [S, H, D].

    `segments`: run the packed kernel. `layer`: its number, for the layout's cache.
    """
    scale = query.shape[-1] ** -0.5
    if layout.cache is not None and segments is None:
        return layout.cache.attend(layer, query, key, value, layout, scale)
    if layout.cache is not None:
        key, value = layout.cache.append(layer, key, value, layout)
    if segments is not None:
        starts, longest, known = segments
        of_keys, longest_key, stored = (starts, longest, None) if known is None else (known.starts, known.longest, known.lengths)
        lengths = starts, of_keys, longest, longest_key
        return flash_attention(query, key, value, *lengths, scale=scale, stored=stored)
    return _attend_each(query, key, value, layout.lengths, scale)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    of_keys: Tensor,
    longest: int,
    longest_key: int,
    *,
    scale: float,
    stored: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed samples [S, H, D] to keys and values [T, Hkv, D], which begin at `starts` and `of_keys` int32 [N + 1].

    `stored` int32 [N]: how many of its keys a sample has; all by default. Each sample's last query sees its last key.

    It is what torch's `varlen_attn` calls, without the operator in Python around it: an H200's host took 0.16 ms to call that, and 0.23 ms
    backward, in place of 0.02 and 0.12, where the kernels for SmolLM2-135M take 0.03 and 0.10.
    """
    lengths = starts, of_keys, longest, longest_key
    return torch.ops.aten._flash_attention_forward(query, key, value, *lengths, 0.0, True, False, scale=scale, seqused_k=stored)[0]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting: from page-locked memory, which a copy may still be reading when this returns."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _int32(values: Sequence[int], device: torch.device) -> Tensor:
    return send(torch.tensor(values, dtype=torch.int32), device)


def has_packed_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether flash attention runs there on heads of that width."""
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
    return torch.cat([attend_to_known(*part, scaling) for part in parts])


def _attend_cached(query: Tensor, keys: Tensor, values: Tensor, layout: PackedLayout, cache: PackedCache, scaling: float) -> Tensor:
    """The same from a cache's buffers; one call where all its samples are here, equally long and with equal capacities."""
    rows = layout.cache_rows
    totals = [cache.lengths[row] + length for row, length in zip(rows, layout.lengths, strict=True)]
    capacities = [end - start for start, end in pairwise(cache.starts)]
    if rows == list(range(len(capacities))) and len(set(layout.lengths)) == len(set(totals)) == len(set(capacities)) == 1:
        known, kept = (part.unflatten(0, (len(rows), capacities[0]))[:, : totals[0]] for part in (keys, values))
        return _attend_last(query.unflatten(0, (len(rows), layout.lengths[0])), known, kept, scaling).flatten(0, 1)
    outputs = []
    for row, total, (begin, end) in zip(rows, totals, pairwise(layout.offsets), strict=True):
        stored = slice(cache.starts[row], cache.starts[row] + total)
        outputs.append(_attend_last(query[begin:end], keys[stored], values[stored], scaling))
    return torch.cat(outputs)


def _attend_last(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    return (_attend_one if query.shape[-3] == 1 else attend_to_known)(query, key, value, scaling)


def _attend_one(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """One token attends to all t of its sample: [..., 1, H, D] x [..., t, Hkv, D] -> [..., 1, H, D].

    The heads that share keys and values are several queries of one head: on a CPU, which otherwise copies keys and values for every head,
    the time for a token grows half as fast with t.
    """
    grouped = query.squeeze(-3).unflatten(-2, (key.shape[-2], -1))
    return _product(grouped, key.transpose(-3, -2), value.transpose(-3, -2), scale=scaling).flatten(-3, -2).unsqueeze(-3)


def attend_to_known(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """The last s tokens of a sample attend causally to all its t tokens: [..., s, H, D] x [..., t, Hkv, D] -> [..., s, H, D]."""
    new, known = query.shape[-3], key.shape[-3]
    mask = None
    if 1 < new < known:
        mask = torch.ones(new, known, dtype=torch.bool, device=query.device).tril(known - new)
    parts = (part.transpose(-3, -2) for part in (query, key, value))
    return _product(*parts, attn_mask=mask, is_causal=new > 1 and mask is None, scale=scaling, enable_gqa=True).transpose(-3, -2)


def _product(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """SDPA of [H, s, D] or [N, H, s, D]: torch's kernels take only the latter."""
    if query.ndim > 3:
        return F.scaled_dot_product_attention(query, key, value, **options)
    return F.scaled_dot_product_attention(query[None], key[None], value[None], **options)[0]
