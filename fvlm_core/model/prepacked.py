"""Matrix products with many rows on CPU, with weights packed once in oneDNN's blocked format.

In fp32, `F.linear` calls a BLAS, which repacks the weight for its kernel on every call. oneDNN accepts a weight that is already packed, and
applies GELU while the product is still in registers. For inference only: the packed copy is made when a layer in evaluation mode first
multiplies enough rows without gradients, and dropped as soon as gradients are enabled.
"""

from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvlm_core.model.linear import FEW_ROWS, Linear, linear

HAS_KERNEL = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class PackedWeight(NamedTuple):
    """A packed weight (or some rows of it), with the identity, version and address of the source tensor to detect changes."""

    packed: Tensor
    weight: Tensor
    version: int
    address: int

    def is_copy_of(self, weight: Tensor) -> bool:
        """Whether this is a packed copy of `weight` in its present state."""
        return self.weight is weight and self.version == weight._version and self.address == weight.data_ptr()


class PrepackedLinear(Linear):
    """`nn.Linear` that keeps a packed copy of its weight for oneDNN if that is faster.

    The copy is renewed after changes by optimizers, `load_state_dict`, `to` and in-place operations, but not after in-place changes through
    `.data`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self._packed_weights: dict[tuple[int, int], PackedWeight] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed_weights": {}}  # oneDNN tensors cannot be copied or saved

    def _apply(self, *args: Any, **options: Any) -> Self:
        self._packed_weights.clear()  # after a move or conversion, an address may be reused for other values
        return super()._apply(*args, **options)

    def train(self, mode: bool = True) -> Self:
        """Set the mode. Entering training drops the packed copy: fused optimizers and FSDP change weights without a new version."""
        if mode:
            self._packed_weights.clear()
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        packed = self._packed(input, slice(None))
        if packed is None:
            return linear(input, self.weight, self.bias)  # the whole parameter: autocast caches casts of parameters, not of slices
        return torch.ops.mkldnn._linear_pointwise(input, packed, self.bias, "none", [], "")

    def part(self, x: Tensor, rows: slice) -> Tensor:
        """[..., in] -> [..., rows]: only the output features `rows`."""
        packed = self._packed(x, rows)
        bias = None if self.bias is None else self.bias[rows]
        if packed is None:
            return linear(x, self.weight[rows], bias)
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    def gelu(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], followed by the exact GELU."""
        packed = self._packed(x, slice(None))
        if packed is None:
            return F.gelu(self(x))
        return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "gelu", [], "none")

    def _packed(self, x: Tensor, rows: slice) -> Tensor | None:
        """Return the packed `rows` of the weight, or None if `linear` should be used."""
        if torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled() or self.training:
            self._packed_weights.clear()  # an optimizer step may follow, even in evaluation mode
            return None
        if x.numel() <= FEW_ROWS * x.shape[-1] or not _takes(x, self.weight):
            return None
        start, stop, _ = rows.indices(self.out_features)
        weight = self.weight
        found = self._packed_weights.get((start, stop))
        if found is None or not found.is_copy_of(weight):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight[rows].detach(), None)
            found = self._packed_weights[start, stop] = PackedWeight(packed, weight, weight._version, weight.data_ptr())
        return found.packed


def gelu_of(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU of `layer(x)`, fused if the layer is not replaced by an adapter."""
    return layer.gelu(x) if isinstance(layer, PrepackedLinear) else F.gelu(layer(x))


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's kernel is available and supports these tensors: fp32 on CPU."""
    if not HAS_KERNEL or type(weight) is not nn.Parameter or weight.is_inference():
        return False
    fp32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return fp32 and x.device.type == weight.device.type == "cpu"
