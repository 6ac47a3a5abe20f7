"""Weights in oneDNN's order: the numbers against float64, where they are used, and that they are never old ones."""

import pickle
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import profile

from fvlm_core.model import prepacked
from fvlm_core.model.flop_counter import count_flops
from fvlm_core.model.linear import FEW_ROWS
from fvlm_core.model.prepacked import PrepackedLinear, gelu_of

KERNEL = "mkldnn::_linear_pointwise"
MANY = FEW_ROWS + 1


def layer(bias: bool = True) -> PrepackedLinear:
    return PrepackedLinear(32, 48, bias=bias).eval()


def kernels(run) -> set[str]:
    with profile() as seen:
        run()
    return {event.key for event in seen.key_averages()}


@given(
    rows=st.integers(0, 3 * FEW_ROWS),
    lead=st.integers(1, 3),
    inner=st.integers(1, 40),
    outer=st.integers(1, 40),
    with_bias=st.booleans(),
    data=st.data(),
)
def test_equals_the_product_in_float64(rows, lead, inner, outer, with_bias, data):
    start = data.draw(st.integers(0, outer - 1))
    part = slice(start, data.draw(st.integers(start + 1, outer)))
    ours, x = PrepackedLinear(inner, outer, bias=with_bias).eval(), torch.randn(lead, rows, inner)
    bias = None if ours.bias is None else ours.bias.double()
    expected = F.linear(x.double(), ours.weight.double(), bias)
    with torch.no_grad():
        for _ in range(2):  # as it lays the weight out, and as it finds it
            for made, right in ((ours(x), expected), (ours.part(x, part), expected[..., part]), (gelu_of(ours, x), F.gelu(expected))):
                assert made.shape == right.shape
                torch.testing.assert_close(made.double(), right, atol=1e-5, rtol=1e-5)


def test_many_rows_are_for_the_kernel():
    ours = layer()
    with torch.no_grad():
        assert KERNEL in kernels(lambda: ours(torch.randn(MANY, 32)))
        assert "aten::gelu" not in kernels(lambda: gelu_of(ours, torch.randn(MANY, 32)))


def in_training(ours, x):
    return ours.train()(x)


def with_gradients(ours, x):
    with torch.enable_grad():
        return ours(x)


def of_few_rows(ours, x):
    return ours(x[:FEW_ROWS])


def in_float64(ours, x):
    return ours.double()(x.double())


def in_bfloat16(ours, x):
    with torch.autocast("cpu", torch.bfloat16):
        return ours(x)


def without_it(ours, x):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepacked, "HAS_KERNEL", False)
        return ours(x)


def compiled(ours, x):
    torch.compiler.reset()
    return torch.compile(ours, backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize("run", [in_training, with_gradients, of_few_rows, in_float64, in_bfloat16, without_it, compiled])
def test_the_kernel_is_left_out(run):
    with torch.no_grad():
        assert KERNEL not in kernels(lambda: run(layer(), torch.randn(MANY, 32)))


def stepped(ours: PrepackedLinear, fused: bool) -> None:
    """A training step in evaluation mode; a fused optimizer changes weights behind autograd's back."""
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1, fused=fused)
    ours(torch.randn(MANY, 32)).square().sum().backward()
    optimizer.step()


def trained_by_others(ours: PrepackedLinear) -> None:
    """The weight is used, not the layer, as where it is cast for all micro-batches of a step."""
    optimizer = torch.optim.AdamW(ours.train().parameters(), lr=0.1, fused=True)
    F.linear(torch.randn(MANY, 32), ours.weight, ours.bias).square().sum().backward()
    optimizer.step()
    ours.eval()


@torch.no_grad()
def doubled(ours: PrepackedLinear) -> None:
    ours.weight.mul_(2)


CHANGES = {
    "fused optimizer": lambda ours: stepped(ours, True),
    "optimizer": lambda ours: stepped(ours, False),
    "its weight trained": trained_by_others,
    "in place": doubled,
    "load_state_dict": lambda ours: ours.load_state_dict(layer().state_dict()),
    "rounded": lambda ours: ours.to(torch.float8_e4m3fn).float(),
    "another parameter": lambda ours: setattr(ours, "weight", layer().weight),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_laid_out_anew(change):
    ours, x = layer(), torch.randn(MANY, 32)
    with torch.no_grad():
        before = ours(x)
    CHANGES[change](ours)
    with torch.no_grad():
        after, expected = ours(x), F.linear(x, ours.weight, ours.bias)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("copied", [deepcopy, lambda ours: pickle.loads(pickle.dumps(ours))])
def test_a_copy_is_on_its_own(copied):
    ours, x = layer(), torch.randn(MANY, 32)
    with torch.no_grad():
        expected = ours(x)
        other = copied(ours)
        doubled(ours)
        torch.testing.assert_close(other(x), expected)
    assert sorted(other.state_dict()) == ["bias", "weight"]


def test_flops_are_counted_as_of_any_product():
    ours, x = layer(), torch.randn(2, MANY, 32)
    with torch.no_grad():
        counted = count_flops(lambda: ours(x))
    assert counted == count_flops(lambda: ours(x)) == 2 * 2 * MANY * 32 * 48
