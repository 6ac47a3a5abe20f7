"""8-bit weights for CPUs: the matrices of the language model and of the encoder's MLPs as int8, with a scale per row.

This saves memory and some of the time per token. Inputs with few rows go through torch's int8 kernel as bf16; with fp32 rows the kernel is
four times slower than `F.linear`. For inputs with many rows the weights are converted to fp32 first, which reads them once more.
Embeddings, norms, the connector and the encoder's attention projections are not quantized. Rounding each row's weights to the nearest of
255 steps needs no data (weight-only quantization; Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, explain why activations, which
have outliers, are harder to quantize).
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvlm_core.model.foveated import FoveatedVLM

KEPT = ("connector", "qkv")
"""Parts of the names of modules that are not quantized; `qkv` is used in slices."""
FEW_ROWS = 16
"""Up to this many rows, the int8 kernel is faster than converting the weights to fp32."""
LARGEST = 127


class Int8Linear(nn.Module):
    """A linear layer with weights in int8 and a scale per row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        rows = linear.weight.detach().float()
        self.scale = nn.Buffer(rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST)
        self.rounded = nn.Buffer((rows / self.scale[:, None]).round().to(torch.int8))
        self.ones = nn.Buffer(torch.ones_like(self.scale, dtype=torch.bfloat16))
        self.bias = None if linear.bias is None else nn.Buffer(linear.bias.detach())

    @property
    def weight(self) -> Tensor:
        """The quantized weights in fp32, [out, in]."""
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
    """Copy a model on the CPU with int8 weights, for inference in fp32."""
    made = deepcopy(model).eval().requires_grad_(False)
    for name, module in list(made.named_modules()):
        if isinstance(module, nn.Linear) and not any(part in name.split(".") for part in KEPT):
            parent, _, leaf = name.rpartition(".")
            setattr(made.get_submodule(parent), leaf, Int8Linear(module))
    return made


def weight_bytes(model: nn.Module) -> int:
    """Size of parameters and buffers in bytes; shared storage counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}.values())
