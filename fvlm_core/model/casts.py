"""Cast weights to the autocast precision once per optimizer step.

Under autocast, every call of a layer casts its fp32 weights again, although they only change between optimizer steps. Here all passes and
micro-batches of a step share one low-precision copy, in which the weights of layers with the same input are concatenated. The gradient of a
copy has its precision and is summed over the passes of a micro-batch, as with autocast's own cache. One kernel then adds it to the fp32
gradient; a cast followed by an addition would read and write twice as much.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Group = Sequence[Tensor | None]
"""Parameters that are concatenated along their first dimension when cast; None stands for a missing bias."""


class Casts:
    """Casts a model's weights and keeps the copies for one optimizer step."""

    def __init__(self) -> None:
        self.parts: frozenset[str] = frozenset()
        """Parts of the model (`encoder`, `llm`) to cast here. Default: none, which leaves casting to autocast."""
        self.adds = False
        """Whether backward adds to `parameter.grad` directly, bypassing autograd's accumulation and its hooks (e.g. DDP's)."""
        self.add: Callable[[list[Tensor], list[Tensor]], None] = add
        self._kept: dict[tuple[int, torch.dtype], list[Tensor]] | None = None

    @contextmanager
    def step(self, *, adds: bool) -> Generator[None]:
        """Share copies within this context. The weights must not change inside it."""
        self._kept, self.adds = {}, adds
        try:
            yield
        finally:
            self._kept, self.adds = None, False

    def dtype(self, part: str, device: torch.device) -> torch.dtype | None:
        """Return the dtype to cast a part's weights to, or None if they are not cast here."""
        enabled = part in self.parts and torch.is_grad_enabled() and torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if enabled else None

    def __call__(self, groups: Sequence[Group], dtype: torch.dtype) -> list[Any]:
        """Return one tensor [sum of first dimensions, ...] per group, or None for a group of Nones. Differentiable."""
        present = [[parameter for parameter in group if parameter is not None] for group in groups]
        filled = [group for group in present if group]
        key = id(filled[0][0]), dtype
        copies = None if self._kept is None else self._kept.get(key)
        if copies is None:
            copies = _copied(filled, dtype)
            if self._kept is not None:
                self._kept[key] = copies
        flat = [parameter for group in filled for parameter in group]
        made: Any = _Cast.apply(self, filled, copies, *flat)
        given = iter(made)
        return [next(given) if group else None for group in present]


def add(totals: list[Tensor], parts: list[Tensor]) -> None:
    """Add each part to its total, which may have another precision. A single kernel if compiled."""
    torch._foreach_add_(totals, parts)


@torch.no_grad()
def _copied(groups: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    copies = [group[0].new_empty((sum(map(len, group)), *group[0].shape[1:]), dtype=dtype) for group in groups]
    parts = [part for copy, group in zip(copies, groups, strict=True) for part in _split(copy, group)]
    torch._foreach_copy_(parts, [parameter for group in groups for parameter in group])
    return copies


def _split(joint: Tensor, group: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return joint.split([len(parameter) for parameter in group])


class _Cast(Function):
    @staticmethod
    def forward(ctx: Any, casts: Casts, groups: list[list[Tensor]], copies: list[Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
        del parameters
        ctx.casts, ctx.groups = casts, groups
        ctx.set_materialize_grads(False)
        given = [copy.detach() for copy in copies]
        frozen = [copy for copy, group in zip(given, groups, strict=True) if not any(parameter.requires_grad for parameter in group)]
        ctx.mark_non_differentiable(*frozen)
        return tuple(given)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        parameters = [parameter for group in ctx.groups for parameter in group]
        parts: list[Tensor | None] = []
        for group, gradient in zip(ctx.groups, gradients, strict=True):
            parts += [None] * len(group) if gradient is None else _split(gradient, group)
        found = {n: part for n, part in enumerate(parts) if part is not None and parameters[n].requires_grad}
        added = {n: parameters[n].grad for n in found if ctx.casts.adds and parameters[n].grad is not None}
        if added:
            ctx.casts.add(list(added.values()), [found[n] for n in added])
        new = {n: torch.empty_like(parameters[n]) for n in found if n not in added}
        if new:
            torch._foreach_copy_(list(new.values()), [found[n] for n in new])
        return None, None, None, *(new.get(n) for n in range(len(parameters)))
