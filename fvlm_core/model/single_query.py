"""Attention with one query per frame, for keys and values that several passes read. Their gradients are materialised only once.

For a single query, the gradient of the keys is an outer product (of the logits' gradient and the query), and so is that of the values (of
the attention weights and the output's gradient). Normally every pass writes gradients as large as the keys and values, and all of them are
read again to be summed. Here each pass returns only the factors of the outer products, as gradients of its `GradientFactors`. The backward
of `gradient_factors` multiplies and sums them in one kernel and adds the gradient of the frame's own attention. This saves memory traffic
if the compiler fuses it; without compilation, torch's attention is faster.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function


class GradientFactors(NamedTuple):
    """Placeholder tensors whose gradients carry the outer-product factors of one pass. Their values are meaningless."""

    weights: Tensor
    """[F, heads, N]."""
    outputs: Tensor
    """[F, heads, head_dim]."""
    logits: Tensor
    """[F, heads, N]."""
    queries: Tensor
    """[F, heads, head_dim]."""


def gradient_factors(key: Tensor, value: Tensor, passes: int) -> list[GradientFactors]:
    """Create the placeholders for each of the passes that will read keys and values [F, heads, N, head_dim]."""
    if not passes:
        return []
    return [GradientFactors(*four) for four in _by_pass(_Share.apply(key, value, passes))]


def attend_once(query: Tensor, key: Tensor, value: Tensor, factors: GradientFactors, scale: float) -> Tensor:
    """Attention from query [F, heads, 1, head_dim] to keys and values [F, heads, N, head_dim]; their gradients go through the factors."""
    return _Attend.apply(query, key.detach(), value.detach(), *factors, scale)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in."""
    return torch.promote_types(dtype, torch.float32)


def _by_pass(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    size = len(GradientFactors._fields)
    return [tensors[start : start + size] for start in range(0, len(tensors), size)]


class _Share(Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, passes: int) -> tuple[Tensor, ...]:
        del value
        ctx.dtype, exact = key.dtype, _exact(key.dtype)
        by_patch, by_feature = key.shape[:3], (*key.shape[:2], key.shape[3])
        made = []
        for _ in range(2 * passes):
            made += [key.new_empty(by_patch, dtype=exact), key.new_empty(by_feature)]
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor, Tensor, None]:
        of_key = [logits[..., None] * queries[:, :, None] for _, _, logits, queries in _by_pass(factors)]
        of_value = [weights[..., None] * outputs[:, :, None] for weights, outputs, _, _ in _by_pass(factors)]
        return sum(of_key[1:], of_key[0]).to(ctx.dtype), sum(of_value[1:], of_value[0]).to(ctx.dtype), None


class _Attend(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *factors_and_scale: Any) -> Tensor:
        scale, exact = factors_and_scale[-1], _exact(query.dtype)
        weights = ((query.to(exact) * key.to(exact)).sum(-1) * scale).softmax(-1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale = scale
        return (weights[..., None] * value.to(exact)).sum(-2, keepdim=True).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # ty: ignore[incompatible-method-override] -- it has one output
        query, key, value, weights = ctx.saved_tensors
        of_weights = (gradient.to(weights.dtype) * value.to(weights.dtype)).sum(-1)
        of_logits = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * ctx.scale
        of_query = (of_logits[..., None] * key.to(weights.dtype)).sum(-2, keepdim=True).to(query.dtype)
        return of_query, None, None, weights, gradient.squeeze(-2), of_logits, query.squeeze(-2), None
