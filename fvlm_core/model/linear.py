"""Matrix products with few rows on CPU, close to the speed of reading the weights.

The next token of a stream multiplies every weight matrix with a single row, so its time is that of reading the weights. The BLAS behind
`F.linear` does this on one thread, and for two to eight rows it first copies the weight into another order. Here the weight is split along
its output features and passed to `bmm`, so that each thread reads a part; as the left operand, its rows are read in memory order. No copy
of the weights is made. One row takes .3 to .5 of `F.linear`'s time on 2 cores (AVX-512) and .5 to .7 on one core, for weights of 576 x 192
to 576 x 49152.
"""

from collections.abc import Sequence
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 16
"""Above this many rows, `F.linear` uses all threads well."""
FEWER_ROWS, FEWEST_ROWS = 8, 2
"""Up to this many rows the weight is the left operand: `FEWER_ROWS` if `out` >= `in`, otherwise `FEWEST_ROWS`."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of x [..., in] with weight [out, in] and bias [out]. Equal up to rounding, faster for few rows on CPU."""
    if not _has_few_rows(x):
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    weight_left = len(rows) <= (FEWER_ROWS if weight.shape[1] <= len(weight) else FEWEST_ROWS)
    parts = gcd(len(weight), max(torch.get_num_threads(), 2 if weight_left else 1))
    if parts < 2:  # `bmm` of a single matrix does the same as `F.linear`
        return F.linear(x, weight, bias)
    cut = weight.unflatten(0, (parts, -1))  # [parts, out / parts, in]
    if weight_left:
        product = torch.bmm(cut, rows.t().expand(parts, -1, -1)).flatten(0, 1).t().contiguous()
    else:
        product = torch.bmm(rows.expand(parts, -1, -1), cut.transpose(1, 2)).transpose(0, 1).flatten(1)
    product = product.unflatten(0, x.shape[:-1])
    return product if bias is None else product + bias


class Linear(nn.Linear):
    """`nn.Linear` that uses `linear`, which is faster for few rows on CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(input, self.weight, self.bias)


def joint(x: Tensor, layers: Sequence[nn.Linear], together: Tensor | None = None) -> tuple[Tensor, ...]:
    """Apply several layers to the same input [..., in]. In compiled code this is one product with their concatenated weights.

    A narrow layer alone leaves most of a GPU idle, and every further layer reads the input again. In compiled code the concatenation is
    part of casting the weights. Elsewhere it would be an extra copy, so each layer runs by itself, as do adapters that replace a layer.
    `together`: the concatenated weights, if already available, of layers without biases.
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
    """The residual sum that the previous layer left to this one (None: no previous layer). Compiled with the norm, it saves a read."""
    return x if added is None else x + added


def _compiles() -> bool:
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()  # an exported graph must keep the original weights


def _has_few_rows(x: Tensor) -> bool:
    """Whether x has at most `FEW_ROWS` rows, in fp32 on CPU, outside of training, autocast and compilation."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return x.ndim > 1 and 0 < x.numel() <= FEW_ROWS * x.shape[-1] and not torch.is_autocast_enabled("cpu")
