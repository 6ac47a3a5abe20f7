"""Weights in the precision of the products, cast once an optimizer step.

Under autocast every call of a layer reads its fp32 weights and writes them anew. They only change between steps, so here all passes
and micro-batches of a step share one copy, in which weights for the same input stand side by side. A copy's gradient comes back in its
precision, summed over the passes of a micro-batch (as with autocast's own cache), and is added to the fp32 gradient in one kernel,
where casting it first and adding it then would read and write twice as much.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Group = Sequence[Tensor | None]
"""Parameters that are cast side by side, along their first dimension; of a layer without biases, Nones."""


class Casts:
    """Casts a model's weights."""

    def __init__(self) -> None:
        self.parts: frozenset[str] = frozenset()
        """Of the model (`encoder`, `llm`), whose weights are cast: none by default, and then autocast does it."""
        self.adds = False
        """Whether a backward adds to the parameters' gradients by itself, past autograd and the hooks of who waits for it."""
        self.add: Callable[[list[Tensor], list[Tensor]], None] = add
        self._kept: dict[tuple[int, torch.dtype], list[Tensor]] | None = None

    @contextmanager
    def step(self, *, adds: bool) -> Generator[None]:
        """Around everything that is computed with the same weights."""
        self._kept, self.adds = {}, adds
        try:
            yield
        finally:
            self._kept, self.adds = None, False

    def dtype(self, part: str, device: torch.device) -> torch.dtype | None:
        """What a part's weights are to be cast to; None where they are not."""
        asked = part in self.parts and torch.is_grad_enabled() and torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if asked else None

    def __call__(self, groups: Sequence[Group], dtype: torch.dtype) -> list[Any]:
        """Each group's parameters as one tensor [sum of first dimensions, ...], differentiably; of a group of Nones, None."""
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
    """Add to each of the totals its part, of another precision; compiled, it is one kernel."""
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
