"""Opened patches and the query that reads them, taken through the encoder's layers together: inference with a glance.

In a layer, a query reads that layer's keys and values of the patches, which those before it have made: neither has to wait for the other to
come out at the end. So a level costs one walk through the weights instead of two, and of a few rows, reading the weights is what takes the
time. Keys and values are written behind those of the glance, where there is space for all levels; nothing is copied when more is opened.
In place, so without gradients: training goes by `fvlm_core.model.glance.open_patches` and reads afterwards, which gives the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fvlm_core.model.encoder import Encoder, FrameFeatures
from fvlm_core.model.encoder_layer import Added, scaled_sum


class Walk:
    """Keys and values of the glance and of what R rows (pairs of a frame and a query) have opened so far."""

    def __init__(self, encoder: Encoder, features: FrameFeatures, temperature: float, more: int, rows: Tensor | None = None) -> None:
        """`more`: the most patches that a row opens, all levels together. `rows` int64 [R]: the frame of each row, where it is no frame."""
        self.encoder, self.temperature = encoder, temperature
        self.n_glance = self.length = features.keys[0].shape[2]
        self._keys, self._values = (_with_space(parts, more, rows) for parts in (features.keys, features.values))

    @property
    def keys(self) -> list[Tensor]:
        """Per layer [R, heads, n, head_dim]."""
        return [part[:, :, : self.length] for part in self._keys]

    @property
    def values(self) -> list[Tensor]:
        """Per layer [R, heads, n, head_dim]."""
        return [part[:, :, : self.length] for part in self._values]

    def open(self, x: Tensor, siblings: Tensor, q: Tensor, bias: Tensor) -> Tensor:
        """Add embedded patches [R, n, D] that see the glance and their `siblings` bool [n, n], and read all that is open.

        Returns the queries [R, 1, D] as they enter the last layer. `bias` [R, 1, 1, all that is open] is added to the query's logits.
        """
        count, start = x.shape[:2], self.length
        n_rows = count.numel()  # ty: ignore[missing-attribute] -- ty takes part of a `torch.Size` for a tuple
        self.length += count[1]
        seen = self._keys[0].new_full((count[1], self.length), -torch.inf)
        seen[:, : self.n_glance] = 0
        seen[:, start:].masked_fill_(siblings, 0)
        *layers, last = self.encoder.layers
        both = torch.cat([x.flatten(0, 1), q.flatten(0, 1)])  # [R * n + R, D]: the rows of either are one piece
        added: Added = None
        for layer, keys, values in zip(layers, self.keys, self.values, strict=False):
            both, more = layer.with_query(both, added, count, keys, values, seen, self.temperature, bias)
            added = layer.added(more)
        x, q = scaled_sum(both, added).tensor_split([n_rows])
        key, value, *_ = last.keys_values(x.unflatten(0, count))
        self.keys[-1][:, :, start:], self.values[-1][:, :, start:] = key, value
        return q[:, None]


def _with_space(parts: Sequence[Tensor], more: int, rows: Tensor | None) -> list[Tensor]:
    """Copies of [F, heads, n, head_dim], of some frames, with space for `more` patches behind."""
    made = []
    for part in parts:
        own = part if rows is None else part.index_select(0, rows)
        n_rows, heads, n, width = own.shape
        space = own.new_empty(n_rows, n + more, heads, width).transpose(1, 2)  # a patch's heads side by side, as projections leave them
        space[:, :, :n] = own
        made.append(space)
    return made
