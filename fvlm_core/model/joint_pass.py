"""Inference with a glance: opened patches and the query that reads them pass through the encoder's layers together.

In each layer, the query needs only that layer's keys and values of the patches, so it does not have to wait until the patches have passed
through all layers. A level then reads the weights once instead of twice, and with few rows, reading the weights dominates the time. Keys
and values are written behind those of the glance, in buffers that are allocated for all levels, so opening more patches copies nothing.
Because the buffers are modified in place, there are no gradients: training encodes the patches first
(`fvlm_core.model.glance.open_patches`) and then reads them, with equal results.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fvlm_core.model.encoder import Encoder, FrameFeatures
from fvlm_core.model.encoder_layer import PendingResidual


class JointPass:
    """Keys and values of the glance and of what R rows (pairs of a frame and a query) have opened so far."""

    def __init__(self, encoder: Encoder, features: FrameFeatures, temperature: float, more: int, rows: Tensor | None = None) -> None:
        """`more`: maximum number of patches a row opens over all levels. `rows` int64 [R]: frame of each row; None if rows are frames."""
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
        """Encode embedded patches x [R, n, D] and read all open patches with the queries q [R, 1, D].

        Patches attend to the glance and to their `siblings` bool [n, n]. `bias` [R, 1, 1, all open tokens] is added to the queries' logits.
        Returns the queries' inputs to the last layer [R, 1, D].
        """
        (rows, n), start = x.shape[:2], self.length
        self.length += n
        mask = self._keys[0].new_full((rows, 1, n + 1, self.length), -torch.inf)
        mask[:, :, :n, : self.n_glance] = 0
        mask[:, :, :n, start:].masked_fill_(siblings, 0)
        mask[:, :, n:] = bias
        *layers, last = self.encoder.layers
        both = torch.cat([x, q], dim=1)
        residual: PendingResidual = None
        for layer, keys, values in zip(layers, self.keys, self.values, strict=False):
            both, more = layer.with_query(both, residual, keys, values, mask, self.temperature)
            residual = layer.pending_residual(more)
        key, value, _, query = last.keys_values(both, residual, n_queries=1)
        self.keys[-1][:, :, start:], self.values[-1][:, :, start:] = key, value
        return query


def _with_space(parts: Sequence[Tensor], more: int, rows: Tensor | None) -> list[Tensor]:
    """Copy tensors [F, heads, n, head_dim], or the frames `rows` of them, into buffers with space for `more` further patches."""
    made = []
    for part in parts:
        own = part if rows is None else part.index_select(0, rows)
        n_rows, heads, n, width = own.shape
        space = own.new_empty(n_rows, n + more, heads, width).transpose(1, 2)  # heads of a patch adjacent, as in the projections' outputs
        space[:, :, :n] = own
        made.append(space)
    return made
