"""Products with many rows on CPU, with weights laid out once for the kernel that reads them.

`F.linear` in fp32 goes to a BLAS, which copies the weight into the order its kernel wants every time. oneDNN takes a weight in that order
from the start, and applies GELU while the product is still in registers. For inference only: the second copy of the weight is made when a
layer in evaluation mode first multiplies enough rows without gradients, and let go when there are gradients again.
"""

from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvlm_core.model.linear import FEW_ROWS, Linear, linear

HAS_KERNEL = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class LaidOut(NamedTuple):
    """Rows of a weight in oneDNN's order, and what tells whether it still is that weight."""

    packed: Tensor
    weight: Tensor
    version: int
    address: int

    def holds(self, weight: Tensor) -> bool:
        """Whether it was made of this weight as it is now."""
        return self.weight is weight and self.version == weight._version and self.address == weight.data_ptr()


class PrepackedLinear(Linear):
    """`nn.Linear` whose weight is also held in oneDNN's order, where that is faster.

    A weight changed in place through `.data` after it was laid out is not noticed; optimizers, `load_state_dict`, `to` and plain in-place
    operations are.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self._laid_out: dict[tuple[int, int], LaidOut] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_laid_out": {}}  # oneDNN's tensors cannot be copied or saved; a copy makes its own

    def _apply(self, *args: Any, **options: Any) -> Self:
        self._laid_out.clear()  # moved or converted: an address may come back with other numbers
        return super()._apply(*args, **options)

    def train(self, mode: bool = True) -> Self:
        """As of any module. What follows may change the weight without a trace: fused optimizers do, and FSDP, which reuses its memory."""
        if mode:
            self._laid_out.clear()
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        packed = self._packed(input, slice(None))
        if packed is None:
            return linear(input, self.weight, self.bias)  # not as a part: autocast keeps its copies of parameters, not of slices
        return torch.ops.mkldnn._linear_pointwise(input, packed, self.bias, "none", [], "")

    def part(self, x: Tensor, rows: slice) -> Tensor:
        """[..., in] -> the output features `rows`."""
        packed = self._packed(x, rows)
        bias = None if self.bias is None else self.bias[rows]
        if packed is None:
            return linear(x, self.weight[rows], bias)
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    def gelu(self, x: Tensor) -> Tensor:
        """The exact GELU of the product."""
        packed = self._packed(x, slice(None))
        if packed is None:
            return F.gelu(self(x))
        return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "gelu", [], "none")

    def _packed(self, x: Tensor, rows: slice) -> Tensor | None:
        """Those rows of the weight in oneDNN's order; None where `linear` is to be used."""
        if torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled() or self.training:
            self._laid_out.clear()  # an optimizer may follow, in evaluation mode too
            return None
        if x.numel() <= FEW_ROWS * x.shape[-1] or not _takes(x, self.weight):
            return None
        start, stop, _ = rows.indices(self.out_features)
        weight = self.weight
        found = self._laid_out.get((start, stop))
        if found is None or not found.holds(weight):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight[rows].detach(), None)
            found = self._laid_out[start, stop] = LaidOut(packed, weight, weight._version, weight.data_ptr())
        return found.packed


def gelu_of(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU of what a layer, or what stands in its place, makes of x."""
    return layer.gelu(x) if isinstance(layer, PrepackedLinear) else F.gelu(layer(x))


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's kernel is there and made for these: fp32, in this computer's memory."""
    if not HAS_KERNEL or type(weight) is not nn.Parameter or weight.is_inference():
        return False
    fp32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return fp32 and x.device.type == weight.device.type == "cpu"
