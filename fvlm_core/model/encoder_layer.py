"""A DINOv2 block for patches and for the queries that read them.

It differs from a plain block in three ways: it returns its keys and values; it leaves its last residual addition to the next block, so that
the addition is compiled together with that block's norm; and queries that are known in advance run together with the patches. See
`fvlm_core.model.encoder` for the whole encoder and its source.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config

from fvlm_core.model.linear import summed
from fvlm_core.model.prepacked import PrepackedLinear, gelu_of
from fvlm_core.model.single_query import Ticket, attend_once, tickets

Added = tuple[Tensor, Tensor, Tensor | None] | None
"""The residual term that a layer leaves to the next: (term, layer scale, bias still to be added or None). None before the first layer."""


def scaled_sum(x: Tensor, added: Added) -> Tensor:
    """Add the previous layer's residual term to x [F, N, D]."""
    return summed(x, None if added is None else _scaled(*added))


def _scaled(x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """(x + bias) * scale. In this form the gradients of scale and bias are sums over the same tensor, which one kernel reads once."""
    return x * scale if bias is None else x * scale + bias * scale


class LayerWeights(NamedTuple):
    """A layer's weight matrices, and the biases that its matrix products add, cast to the precision of the products."""

    qkv: Tensor
    qkv_bias: Tensor | None
    fc1: Tensor
    fc1_bias: Tensor
    out: Tensor
    fc2: Tensor


class EncoderLayer(nn.Module):
    """A DINOv2 block that returns its keys and values."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        width, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.heads = config.num_attention_heads
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv = PrepackedLinear(width, 3 * width, bias=config.qkv_bias)
        self.out = PrepackedLinear(width, width)
        self.scale1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = PrepackedLinear(width, hidden)
        self.fc2 = PrepackedLinear(hidden, width)
        self.scale2 = nn.Parameter(torch.ones(width))

    def keys_values(
        self, x: Tensor, added: Added = None, passes: int = 0, asking: int = 0, weights: LayerWeights | None = None
    ) -> tuple[Tensor, Tensor, list[Ticket], Tensor]:
        """Compute only the keys and values [F, heads, N, head_dim] of the patches, as the last layer needs nothing else.

        Also returns `passes` tickets, and the last `asking` tokens [F, asking, D] of the input, which are queries, unchanged.
        """
        x = scaled_sum(x, added)
        patches, queries = x.split([x.shape[1] - asking, asking], dim=1)
        key, value = self._project(self.norm1(patches), slice(x.shape[-1], None), weights)
        return key, value, tickets(key, value, passes), queries

    def forward(
        self,
        x: Tensor,
        added: Added = None,
        context_key: Tensor | None = None,
        context_value: Tensor | None = None,
        seen: Tensor | None = None,
        passes: int = 0,
        asking: int = 0,
        weights: LayerWeights | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Ticket]]:
        """Apply the layer to x [F, N, D], after adding the previous layer's residual term.

        Tokens attend to each other or, with a context, to M context tokens and each other as the mask `seen` bool [N, M + N] allows. The
        last `asking` of the N tokens are queries, to which no token attends.

        Returns x [F, N, D] without the layer's own last residual term, that term (see `added`), keys and values of the patches, and
        `passes` tickets.
        """
        x = scaled_sum(x, added)
        query, key, value = self._project(self.norm1(x), slice(None), weights)
        if asking:
            key, value = key[:, :, :-asking], value[:, :, :-asking]
        if context_key is None or context_value is None:
            attended = F.scaled_dot_product_attention(query, key, value)
        else:
            around = torch.cat([context_key, key], dim=2), torch.cat([context_value, value], dim=2)
            attended = F.scaled_dot_product_attention(query, *around, attn_mask=seen)
        return *self._attended(x, attended, weights), key, value, tickets(key, value, passes)

    def query(
        self,
        q: Tensor,
        key: Tensor,
        value: Tensor,
        temperature: float,
        bias: Tensor | None = None,
        ticket: Ticket | None = None,
        weights: LayerWeights | None = None,
    ) -> Tensor:
        """Apply the layer to queries [F, Q, D]. They attend to the frame's keys and values [F, heads, N, head_dim], not to each other.

        `bias` [F, 1, Q, N] is added to the logits after the division by the temperature. `ticket`: carries the gradients of keys and values
        (`fvlm_core.model.single_query`); requires Q = 1 and no bias.
        """
        assert bias is None or ticket is None, "a ticket does not carry the gradients of attention with a bias"
        (query,) = self._project(self.norm1(q), slice(0, q.shape[-1]), weights)
        scale = query.shape[-1] ** -0.5 / temperature
        if ticket is not None:
            return self._finish(q, attend_once(query, key, value, ticket, scale), weights)
        return self._finish(q, F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale), weights)

    def with_query(
        self,
        both: Tensor,
        added: Added,
        count: Sequence[int],
        keys: Tensor,
        values: Tensor,
        seen: Tensor,
        temperature: float,
        bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Apply the layer to opened patches and the queries that read them in one go (see `fvlm_core.model.walk`).

        `both` [R * n + R, D]: n patches of each of R rows, followed by one query of each row. `count`: (R, n). The patches' keys and values
        are written to the last n places of `keys` and `values` [R, heads, N, head_dim]. `seen` float [n, N] and `bias` [R, 1, 1, N] are
        added to the attention logits of patches and queries. Returns x and the residual term for the next layer, as `forward` does.
        """
        both = scaled_sum(both, added)
        patches, queries = self.norm1(both).tensor_split([count[0] * count[1]])
        query, key, value = self._project(patches.unflatten(0, count), slice(None))
        (reading,) = self._project(queries[:, None], slice(0, both.shape[-1]))
        keys[:, :, -count[1] :], values[:, :, -count[1] :] = key, value
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen)
        read = F.scaled_dot_product_attention(reading, keys, values, attn_mask=bias, scale=reading.shape[-1] ** -0.5 / temperature)
        return self._finished(both, torch.cat([part.transpose(1, 2).flatten(2).flatten(0, 1) for part in (attended, read)]))

    def weights(self, q: Tensor, key: Tensor, temperature: float, bias: Tensor | None = None) -> Tensor:
        """Attention weights [F, heads, Q, N] of queries [F, Q, D]."""
        return self.logits(q, key, temperature, bias).float().softmax(-1)

    def logits(self, q: Tensor, key: Tensor, temperature: float, bias: Tensor | None = None) -> Tensor:
        """Attention logits [F, heads, Q, N] of queries [F, Q, D]."""
        (query,) = self._project(self.norm1(q), slice(0, q.shape[-1]))
        logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 / temperature)
        return logits if bias is None else logits + bias

    @property
    def matrices(self) -> list[list[Tensor | None]]:
        """The parameters to cast for `LayerWeights`, in its order, each a group of its own."""
        with_bias = [tensor for layer in (self.qkv, self.fc1) for tensor in (layer.weight, layer.bias)]
        return [[tensor] for tensor in (*with_bias, self.out.weight, self.fc2.weight)]

    def added(self, more: Tensor, weights: LayerWeights | None = None) -> Added:
        """Build the `added` argument of the next layer from `more`, the second result of `forward` with the same `weights`."""
        return more, self.scale2, None if weights is None else self.fc2.bias

    def _project(self, x: Tensor, part: slice, weights: LayerWeights | None = None) -> tuple[Tensor, ...]:
        """Apply the output rows `part` of the fused projection; return tensors [F, heads, N, head_dim]."""
        if weights is None:
            projected = self.qkv.part(x, part)
        else:
            projected = F.linear(x, weights.qkv[part], None if weights.qkv_bias is None else weights.qkv_bias[part])
        return tuple(p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projected.split(x.shape[-1], dim=-1))

    def _attended(self, x: Tensor, attended: Tensor, weights: LayerWeights | None) -> tuple[Tensor, Tensor]:
        return self._finished(x, attended.transpose(1, 2).flatten(2), weights)

    def _finished(self, x: Tensor, attended: Tensor, weights: LayerWeights | None = None) -> tuple[Tensor, Tensor]:
        if weights is None:
            x = x + self.out(attended) * self.scale1
            return x, self.fc2(gelu_of(self.fc1, self.norm2(x)))
        x = x + _scaled(F.linear(attended, weights.out), self.scale1, self.out.bias)
        hidden = F.linear(self.norm2(x), weights.fc1, weights.fc1_bias)
        return x, F.linear(F.gelu(hidden), weights.fc2)

    def _finish(self, x: Tensor, attended: Tensor, weights: LayerWeights | None = None) -> Tensor:
        x, more = self._attended(x, attended, weights)
        return scaled_sum(x, self.added(more, weights))
