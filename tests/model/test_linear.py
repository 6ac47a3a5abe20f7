"""Products with few rows against float64, and where they are used."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import profile

from fvlm_core.model.linear import FEW_ROWS, Linear, linear


@contextmanager
def n_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@given(
    rows=st.integers(0, FEW_ROWS + 2),
    lead=st.integers(0, 2),
    inner=st.integers(1, 40),
    outer=st.integers(1, 40),
    with_bias=st.booleans(),
    sliced=st.booleans(),
    threads=st.integers(1, 6),
)
def test_equals_the_product_in_float64(rows, lead, inner, outer, with_bias, sliced, threads):
    x = torch.randn(*[1] * lead, rows, inner)
    weight = torch.randn(outer + 3, inner)[3:] if sliced else torch.randn(outer, inner)
    bias = torch.randn(outer) if with_bias else None
    with torch.no_grad(), n_threads(threads):
        ours = linear(x, weight, bias)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rows", "kernel"), [(1, "aten::bmm"), (FEW_ROWS + 1, "aten::addmm")])
def test_threads_share_the_weights_of_few_rows_only(rows, kernel):
    layer = Linear(32, 64)
    with torch.no_grad(), n_threads(2), profile() as seen:
        layer(torch.randn(rows, 32))
    assert kernel in {event.key for event in seen.key_averages()}
