"""Weights cast once a step: the same products and gradients, and never those of another step."""

import pytest
import torch
from torch import nn

from fvlm_core.model.casts import Casts

X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def layers(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """Two matrices of one input, a bias, and a frozen matrix."""
    torch.manual_seed(1)
    made = [nn.Parameter(torch.randn(*shape, dtype=dtype)) for shape in ((4, 3), (2, 3), (6,), (2, 3))]
    made[3].requires_grad_(False)
    return made


def loss(first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor, frozen: torch.Tensor, *, number: int) -> torch.Tensor:
    x = X.to(first.dtype) * (1 + number)
    return ((x @ torch.cat([first, second]).T + bias).square().sum() + (x @ frozen.T @ second).square().sum()).double()


@pytest.mark.parametrize("adds", [False, True])
def test_gradients_are_those_of_the_weights_themselves(adds: bool) -> None:
    """In float64, over three micro-batches of two passes each, of which the second also uses a weight as it is."""
    plain, cast = layers(), layers()
    casts = Casts()
    with casts.step(adds=adds):
        for number in range(3):
            loss(*plain, number=number).backward()
            loss(*plain, number=number + 7).backward()
            joint, bias, none, frozen = casts([cast[:2], [cast[2]], [None], [cast[3]]], torch.float64)
            assert joint is not None
            assert bias is not None
            assert none is None
            assert frozen is not None
            assert not frozen.requires_grad
            first, second = joint.split([4, 2])
            (loss(first, second, bias, frozen, number=number) + loss(first, second, bias, frozen, number=number + 7)).backward()
            if number == 1:
                plain[0].sum().backward()
                cast[0].sum().backward()
    for mine, theirs in zip(cast, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-9, rtol=1e-9)


def test_sums_over_micro_batches_are_fp32() -> None:
    """What is added up in bf16 would stay at 256 when ones are added."""
    weight = nn.Parameter(torch.zeros(1, 1))
    casts = Casts()
    with casts.step(adds=True):
        for _ in range(300):
            (copy,) = casts([[weight]], torch.bfloat16)
            assert copy is not None
            copy.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert weight.grad.item() == 300


def test_a_copy_lasts_a_step() -> None:
    weight, casts = nn.Parameter(torch.ones(2, 2)), Casts()

    def copy() -> torch.Tensor:
        (made,) = casts([[weight]], torch.bfloat16)
        assert made is not None
        return made

    with casts.step(adds=True):
        assert copy().data_ptr() == copy().data_ptr()
    with torch.no_grad():
        weight.mul_(2)
    twos = torch.full((2, 2), 2.0, dtype=torch.bfloat16)
    assert torch.equal(copy(), twos)
    with casts.step(adds=True):
        assert torch.equal(copy(), twos)


def test_asked_for_by_part_under_autocast_with_gradients() -> None:
    casts, cpu = Casts(), torch.device("cpu")
    casts.parts = frozenset(["llm"])
    assert casts.dtype("llm", cpu) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert casts.dtype("llm", cpu) is torch.bfloat16
        assert casts.dtype("encoder", cpu) is None
        with torch.no_grad():
            assert casts.dtype("llm", cpu) is None
