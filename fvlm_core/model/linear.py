"""Products with few rows on CPU, as fast as the weights can be read.

A stream's next token multiplies every weight with a single row, so its time is that of reading the weights. The BLAS behind `F.linear` does
this on one thread, and for two to eight rows it first copies the weight into another order. Cut along the output features and given to
`bmm`, every thread reads a part; with the weight as the left operand, its rows are read as they lie. On 2 cores (AVX-512) one row takes .3
to .5 of `F.linear`'s time, on one core .5 to .7 (weights of 576 x 192 to 576 x 49152); without a copy of the weights.
"""

from collections.abc import Sequence
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 16
"""Beyond, `F.linear` uses every thread well by itself."""
FEWER_ROWS, FEWEST_ROWS = 8, 2
"""Up to here the weight is the left operand: where the product is at least as wide as the input, and anyway."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of x [..., in] with weight [out, in] and bias [out]; to rounding the same, faster for few rows on CPU."""
    if not _has_few_rows(x):
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    weight_left = len(rows) <= (FEWER_ROWS if weight.shape[1] <= len(weight) else FEWEST_ROWS)
    parts = gcd(len(weight), max(torch.get_num_threads(), 2 if weight_left else 1))
    if parts < 2:  # `bmm` of one matrix is `F.linear` again
        return F.linear(x, weight, bias)
    cut = weight.unflatten(0, (parts, -1))  # [parts, out / parts, in]
    if weight_left:
        product = torch.bmm(cut, rows.t().expand(parts, -1, -1)).flatten(0, 1).t().contiguous()
    else:
        product = torch.bmm(rows.expand(parts, -1, -1), cut.transpose(1, 2)).transpose(0, 1).flatten(1)
    product = product.unflatten(0, x.shape[:-1])
    return product if bias is None else product + bias


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(input, self.weight, self.bias)


def joint(x: Tensor, layers: Sequence[nn.Linear], together: Tensor | None = None) -> tuple[Tensor, ...]:
    """What several layers make of the same input [..., in]; compiled, it is one product with their weights side by side.

    A narrow layer alone leaves most of a GPU idle, and its input would be read again. Compiled, putting weights side by side is part of
    casting them; otherwise it would be a copy, so every layer has a product of its own, as has an adapter in a layer's place.
    `together`: their weights side by side, where they are at hand, without biases.
    """
    if together is not None:
        return F.linear(x, together).split([layer.out_features for layer in layers], dim=-1)
    if not (_compiles() and all(type(layer) is Linear for layer in layers)):
        return tuple(layer(x) for layer in layers)
    weights: list[Tensor] = [layer.weight for layer in layers]
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    product = F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)
    return product.split([layer.out_features for layer in layers], dim=-1)


def summed(x: Tensor, added: Tensor | None) -> Tensor:
    """The residual sum that a layer leaves to the next (None: the first): compiled with its norm, the parts are read once less."""
    return x if added is None else x + added


def _compiles() -> bool:
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()  # an exported graph keeps the weights as they are


def _has_few_rows(x: Tensor) -> bool:
    """Whether x is few rows of fp32 in this computer's memory, at inference."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return x.ndim > 1 and 0 < x.numel() <= FEW_ROWS * x.shape[-1] and not torch.is_autocast_enabled("cpu")
