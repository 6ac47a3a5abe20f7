"""One query per frame on keys and values that several passes read: their gradients are written and added up only once.

Of a single query, the gradient of the keys is an outer product (of the logits' gradient and the query), and so is that of the values (of
the weights and the output's gradient). Written out by every pass, each is as large as the keys, and all are read again to be added. Here a
pass gives back the factors, as the gradients of a `Ticket`, and where keys and values were made, one kernel adds the products to what the
frame's own attention gives. That saves memory traffic where the compiler makes it one kernel; without it, torch's attention is faster.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function


class Ticket(NamedTuple):
    """No numbers, only the way back for a pass's factors."""

    weights: Tensor
    """[F, heads, N]."""
    outputs: Tensor
    """[F, heads, head_dim]."""
    logits: Tensor
    """[F, heads, N]."""
    queries: Tensor
    """[F, heads, head_dim]."""


def tickets(key: Tensor, value: Tensor, passes: int) -> list[Ticket]:
    """One for each pass that will read keys and values [F, heads, N, head_dim]."""
    if not passes:
        return []
    return [Ticket(*four) for four in _by_pass(_Share.apply(key, value, passes))]


def attend_once(query: Tensor, key: Tensor, value: Tensor, ticket: Ticket, scale: float) -> Tensor:
    """Attention of query [F, heads, 1, head_dim] to N keys and values; their gradients go back by the ticket."""
    return _Attend.apply(query, key.detach(), value.detach(), *ticket, scale)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """What is added up in."""
    return torch.promote_types(dtype, torch.float32)


def _by_pass(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    size = len(Ticket._fields)
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
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *ticket_and_scale: Any) -> Tensor:
        scale, exact = ticket_and_scale[-1], _exact(query.dtype)
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
