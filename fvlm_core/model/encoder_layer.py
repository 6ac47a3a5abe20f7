"""A DINOv2 block for patches and for the queries that read them.

It differs from a plain block in three ways: it returns its keys and values; it leaves its last residual addition to the next block, so that
the addition is compiled together with that block's norm; and queries that are known in advance run together with the patches. See
`fvlm_core.model.encoder` for the whole encoder and its source.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config

from fvlm_core.model.linear import summed
from fvlm_core.model.prepacked import PrepackedLinear, gelu_of
from fvlm_core.model.single_query import GradientFactors, attend_once, gradient_factors

PendingResidual = tuple[Tensor, Tensor, Tensor | None] | None
"""The residual term that a layer leaves to the next: (term, layer scale, bias to add, or None). None before the first layer."""


def scaled_sum(x: Tensor, residual: PendingResidual) -> Tensor:
    """Add the previous layer's residual term to x [F, N, D]."""
    return summed(x, None if residual is None else _scaled(*residual))


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
        self, x: Tensor, residual: PendingResidual = None, passes: int = 0, n_queries: int = 0, weights: LayerWeights | None = None
    ) -> tuple[Tensor, Tensor, list[GradientFactors], Tensor]:
        """Compute only the keys and values [F, heads, N, head_dim] of the patches, as the last layer needs nothing else.

        Also returns `passes` gradient factors, and, unchanged, the last `n_queries` tokens of the input, which are queries.
        """
        x = scaled_sum(x, residual)
        patches, queries = x.split([x.shape[1] - n_queries, n_queries], dim=1)
        key, value = self._project(self.norm1(patches), slice(x.shape[-1], None), weights)
        return key, value, gradient_factors(key, value, passes), queries

    def forward(
        self,
        x: Tensor,
        residual: PendingResidual = None,
        context_key: Tensor | None = None,
        context_value: Tensor | None = None,
        mask: Tensor | None = None,
        passes: int = 0,
        n_queries: int = 0,
        weights: LayerWeights | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[GradientFactors]]:
        """Apply the layer to x [F, N, D], after adding the previous layer's residual term.

        Tokens attend to each other or, with a context, to M context tokens and each other as the `mask` bool [N, M + N] allows. The
        last `n_queries` of the N tokens are queries, to which no token attends.

        Returns x [F, N, D] without the layer's own last residual term, that term (see `residual`), keys and values of the patches, and
        `passes` gradient factors.
        """
        x = scaled_sum(x, residual)
        query, key, value = self._project(self.norm1(x), slice(None), weights)
        if n_queries:
            key, value = key[:, :, :-n_queries], value[:, :, :-n_queries]
        if context_key is None or context_value is None:
            attended = F.scaled_dot_product_attention(query, key, value)
        else:
            around = torch.cat([context_key, key], dim=2), torch.cat([context_value, value], dim=2)
            attended = F.scaled_dot_product_attention(query, *around, attn_mask=mask)
        return *self._finish(x, attended, weights), key, value, gradient_factors(key, value, passes)

    def query(
        self,
        q: Tensor,
        key: Tensor,
        value: Tensor,
        temperature: float,
        bias: Tensor | None = None,
        factors: GradientFactors | None = None,
        weights: LayerWeights | None = None,
    ) -> Tensor:
        """Apply the layer to queries [F, Q, D]. They attend to the frame's keys and values [F, heads, N, head_dim], not to each other.

        `bias` [F, 1, Q, N] is added to the logits after the division by the temperature. `factors`: carry the gradients of keys and
        values (`fvlm_core.model.single_query`); requires Q = 1 and no bias.
        """
        assert bias is None or factors is None, "gradient factors do not cover attention with a bias"
        (query,) = self._project(self.norm1(q), slice(0, q.shape[-1]), weights)
        scale = query.shape[-1] ** -0.5 / temperature
        if factors is not None:
            return self._output(q, attend_once(query, key, value, factors, scale), weights)
        return self._output(q, F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale), weights)

    def with_query(
        self, x: Tensor, residual: PendingResidual, keys: Tensor, values: Tensor, mask: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Apply the layer to opened patches and the query that reads them in one go (see `fvlm_core.model.joint_pass`).

        x [R, n + 1, D]: n patches of each row and, last, its query. The patches' keys and values are written to the last n places of `keys`
        and `values` [R, heads, N, head_dim]. `mask` float [R, 1, n + 1, N] is added to the attention logits. Returns x and the residual
        term for the next layer, as `forward` does.
        """
        x = scaled_sum(x, residual)
        query, key, value = self._project(self.norm1(x), slice(None))
        n = x.shape[1] - 1
        keys[:, :, -n:], values[:, :, -n:] = key[:, :, :n], value[:, :, :n]
        if temperature != 1:
            query[:, :, n:] /= temperature
        return self._finish(x, F.scaled_dot_product_attention(query, keys, values, attn_mask=mask), None)

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

    def pending_residual(self, more: Tensor, weights: LayerWeights | None = None) -> PendingResidual:
        """Build the `residual` argument of the next layer from `more`, the second result of `forward` with the same `weights`."""
        return more, self.scale2, None if weights is None else self.fc2.bias

    def _project(self, x: Tensor, part: slice, weights: LayerWeights | None = None) -> tuple[Tensor, ...]:
        """Apply the output rows `part` of the fused projection; return tensors [F, heads, N, head_dim]."""
        if weights is None:
            projected = self.qkv.part(x, part)
        else:
            projected = F.linear(x, weights.qkv[part], None if weights.qkv_bias is None else weights.qkv_bias[part])
        return tuple(p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projected.split(x.shape[-1], dim=-1))

    def _finish(self, x: Tensor, attended: Tensor, weights: LayerWeights | None) -> tuple[Tensor, Tensor]:
        """Apply what follows the attention [F, heads, N, head_dim] of x [F, N, D]; returns x and the residual term for the next layer."""
        attended = attended.transpose(1, 2).flatten(2)
        if weights is None:
            x = x + self.out(attended) * self.scale1
            return x, self.fc2(gelu_of(self.fc1, self.norm2(x)))
        x = x + _scaled(F.linear(attended, weights.out), self.scale1, self.out.bias)
        hidden = F.linear(self.norm2(x), weights.fc1, weights.fc1_bias)
        return x, F.linear(F.gelu(hidden), weights.fc2)

    def _output(self, x: Tensor, attended: Tensor, weights: LayerWeights | None = None) -> Tensor:
        x, more = self._finish(x, attended, weights)
        return scaled_sum(x, self.pending_residual(more, weights))
