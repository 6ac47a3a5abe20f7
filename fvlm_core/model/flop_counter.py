"""Count the FLOPs of running code with torch's counter, extended by CPU kernels that it does not know."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_flops(function: Callable[[], Any]) -> int:
    """Return the FLOPs of all matrix products and attention that `function()` runs, including a backward pass if it runs one."""
    ops = torch.ops.aten
    mapping: dict[Any, Any] = {
        ops._scaled_dot_product_flash_attention_for_cpu: _forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
        torch.ops.mkldnn._linear_pointwise: _product,
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter:
        function()
    return counter.get_total_flops()


def _forward(query: tuple[int, ...], key: tuple[int, ...], *_rest: object, **_options: object) -> int:
    """FLOPs of attention with query [B, H, S, D] and key [B, Hkv, T, D]: query times key, and weights times value."""
    batch, heads, new, width = query
    return 4 * batch * heads * new * key[-2] * width


def _backward(_grad: tuple[int, ...], query: tuple[int, ...], key: tuple[int, ...], *_rest: object, **_options: object) -> int:
    """Five products instead of two: the recomputed weights, and the gradients of value, weights, query and key."""
    return _forward(query, key) * 5 // 2


def _product(x: tuple[int, ...], weight: tuple[int, ...], *_rest: object, **_options: object) -> int:
    """FLOPs of x [..., in] times weight [out, in]."""
    return 2 * prod(x) * weight[0]
