"""8-bit weights for CPUs: the matrices of the language model and of the encoder's MLPs as int8 with a scale per row.

What it gains is memory, and some of the time of a token; with many rows the weights are made fp32 first, which costs one more reading of
them. Few rows go through torch's kernel as bf16: with fp32 rows it is four times slower than `F.linear`. Embeddings, norms, the connector
and the encoder's attention projections stay as they are. Rounding weights to the nearest of 255 steps per row needs no data (weight-only
quantization; Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, say why activations, which have outliers, are better left alone).
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvlm_core.model.foveated import FoveatedVLM

KEPT = ("connector", "qkv")
"""Parts of names of what stays: `qkv` is used in slices."""
FEW_ROWS = 16
"""Up to here the int8 kernel is faster than making the weights fp32."""
LARGEST = 127


class Int8Linear(nn.Module):
    """A linear layer whose weights are rounded to int8, row by row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        rows = linear.weight.detach().float()
        self.scale = nn.Buffer(rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST)
        self.rounded = nn.Buffer((rows / self.scale[:, None]).round().to(torch.int8))
        self.ones = nn.Buffer(torch.ones_like(self.scale, dtype=torch.bfloat16))
        self.bias = None if linear.bias is None else nn.Buffer(linear.bias.detach())

    @property
    def weight(self) -> Tensor:
        """[out, in] in fp32, as rounded."""
        return self.rounded.float() * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = x.flatten(0, -2)
        if len(rows) > FEW_ROWS:
            return F.linear(x, self.weight, self.bias)
        product = torch.ops.aten._weight_int8pack_mm(rows.bfloat16(), self.rounded, self.ones).float() * self.scale
        product = product.to(x.dtype).unflatten(0, x.shape[:-1])
        return product if self.bias is None else product + self.bias


def int8_weights(model: FoveatedVLM) -> FoveatedVLM:
    """A copy of a model on the CPU with int8 weights, for inference in fp32."""
    made = deepcopy(model).eval().requires_grad_(False)
    for name, module in list(made.named_modules()):
        if isinstance(module, nn.Linear) and not any(part in name.split(".") for part in KEPT):
            parent, _, leaf = name.rpartition(".")
            setattr(made.get_submodule(parent), leaf, Int8Linear(module))
    return made


def weight_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, each storage once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}.values())
