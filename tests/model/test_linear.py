"""Products with few rows against float64, and where they are used."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import profile

from fvlm_core.config import LossSettings
from fvlm_core.data.batch import pack
from fvlm_core.model import linear as module
from fvlm_core.model.linear import FEW_ROWS, Linear, joint, linear
from tests.model.build import CHAT, sample, tiny_model


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


@pytest.mark.parametrize("with_bias", [False, True])
def test_layers_of_one_input_are_one_product_when_compiled(with_bias):
    """With the numbers and gradients of each by itself, forward and backward."""
    layers = [Linear(16, width, bias=with_bias) for width in (8, 4, 4)]
    x = torch.randn(5, 16, requires_grad=True)
    torch.compiler.reset()
    products = []

    def backend(graph, _inputs):
        products.extend(node for node in graph.graph.nodes if node.target is torch.nn.functional.linear)
        return graph.forward

    results = []
    for function in (joint, torch.compile(joint, backend=backend, fullgraph=True)):
        made = function(x, layers)
        assert [part.shape[-1] for part in made] == [8, 4, 4]
        sum((part * (n + 1)).square().sum() for n, part in enumerate(made)).backward()
        results.append([*made, x.grad, *(p.grad for layer in layers for p in layer.parameters())])
        x.grad = None
        for layer in layers:
            layer.zero_grad()
    assert len(products) == 1
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_computed_compiled_is_the_same_in_float64(monkeypatch, checkpointing):
    """Loss and all gradients: products side by side differ in rounding only."""
    batch = pack([sample(np.random.default_rng(n), frames=frames) for n, frames in enumerate((3, 0, 2))], CHAT)
    results = []
    for compiled in (False, True):
        monkeypatch.setattr(module, "_compiles", lambda compiled=compiled: compiled)
        model = tiny_model().train()
        model.set_gradient_checkpointing(checkpointing)
        objective = model(batch, LossSettings()).objective
        objective.backward()
        results.append([objective.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-9)


def test_an_adapter_in_a_layers_place_is_computed(monkeypatch):
    """Compiled too: its weights are not taken for the layer's."""

    class Adapter(Linear):
        def forward(self, input):
            return super().forward(input) + 1.0

    monkeypatch.setattr(module, "_compiles", lambda: True)
    x, plain, adapted = torch.randn(3, 8), Linear(8, 4), Adapter(8, 4)
    torch.testing.assert_close(joint(x, (plain, adapted)), (plain(x), adapted(x)))
