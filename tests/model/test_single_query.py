"""Gradients by factors against those of torch's attention."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fvlm_core.config import LossSettings
from fvlm_core.data.batch import pack
from fvlm_core.model import linear
from fvlm_core.model.single_query import attend_once, gradient_factors
from tests.model.build import CHAT, sample, tiny_model


@pytest.mark.parametrize("passes", [1, 3])
def test_equals_torchs_attention_and_its_gradients(passes: int) -> None:
    """In float64, with keys that the frame's own attention reads too."""
    torch.manual_seed(0)
    key, value = (torch.randn(4, 2, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    queries = [torch.randn(4, 2, 1, 8, dtype=torch.float64, requires_grad=True) for _ in range(passes)]
    wanted = [torch.randn(4, 2, 1, 8, dtype=torch.float64) for _ in range(passes)]
    results = []
    for by_factors in (False, True):
        given = gradient_factors(key, value, passes) if by_factors else [None] * passes
        outs = [
            F.scaled_dot_product_attention(q, key, value, scale=0.5) if factors is None else attend_once(q, key, value, factors, 0.5)
            for q, factors in zip(queries, given, strict=True)
        ]
        total = sum((out * target).sum() for out, target in zip(outs, wanted, strict=True))
        (total + F.scaled_dot_product_attention(key, key, value).square().sum()).backward()
        results.append([*outs, *(part.grad for part in (key, value, *queries))])
        for part in (key, value, *queries):
            part.grad = None
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-12)


def test_factors_that_are_not_used_add_nothing() -> None:
    key, value = (torch.randn(2, 1, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    query = torch.randn(2, 1, 1, 4, dtype=torch.float64)
    grads = []
    for passes in (1, 2):
        attend_once(query, key, value, gradient_factors(key, value, passes)[0], 1.0).sum().backward()
        grads.append((key.grad, value.grad))
        key.grad = value.grad = None
    torch.testing.assert_close(*grads)


def test_a_layer_refuses_a_bias_beside_gradient_factors() -> None:
    """Attention with factored gradients has no bias: it would be left out of the result."""
    layer = tiny_model().encoder.layers[0]
    width = layer.out.in_features
    query, key, bias = (torch.randn(2, *shape).double() for shape in ((1, width), (layer.heads, 5, width // layer.heads), (1, 1, 5)))
    with pytest.raises(AssertionError, match="a bias"):
        layer.query(query, key, key, 1.0, bias, gradient_factors(key, key, 1)[0])
    assert not torch.equal(layer.query(query, key, key, 1.0, bias), layer.query(query, key, key, 1.0))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("changes", [{"fine_iterations": 2}, {"tokens_per_frame": 4}, {"temperature": 0.5}], ids=str)
def test_a_models_loss_and_gradients_are_the_same(checkpointing: bool, repeated: bool, changes: dict[str, Any]) -> None:
    """Also where a frame is shown several times, and so read with several queries at once, the usual way.

    The coarse pass's queries go through the layers beside the patches, where no temperature is set.
    """
    shown = [[0, 1, 1]] if repeated else None
    samples = [sample(np.random.default_rng(n), frames=frames, shown=shown) for n, frames in enumerate((2, 2))]
    batch = pack(samples, CHAT, tokens_per_frame=changes.get("tokens_per_frame", 1))
    results = []
    for factored in (False, True):
        model = tiny_model(**{"fine_iterations": 1} | changes).train()
        fine = model.settings.fine_iterations
        model.set_gradient_checkpointing(checkpointing)
        model.encoder.factored_gradients = factored
        features = model.encode(batch.frames)
        assert [len(of_layer) for of_layer in features.factors] == ([1 + fine] * len(model.encoder.layers) if factored else [])
        assert (features.read is not None) == (factored and "temperature" not in changes)
        losses = model(batch, LossSettings(coarse=1.0, fine=[1.0] * fine))
        losses.objective.backward()
        results.append([losses.objective.detach(), losses.entropy, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-9)


def test_in_bf16_what_is_compiled_is_as_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient factors, joint products and weights that are cast once: the mean error of gradients against float64 is the plain step's."""
    errors: dict[str, list[float]] = {"plain": [], "compiled": []}
    for number in range(12):
        batch = pack([sample(np.random.default_rng([number, n]), frames=6) for n in range(3)], CHAT)
        gradients = {}
        for kind in ("float64", *errors):
            monkeypatch.setattr(linear, "_compiles", lambda kind=kind: kind == "compiled")
            model = tiny_model(fine_iterations=2).train()
            model = model if kind == "float64" else model.float()
            model.encoder.factored_gradients = kind == "compiled"
            model.casts.parts = frozenset(["encoder", "llm"] if kind == "compiled" else [])
            with torch.autocast("cpu", torch.bfloat16, enabled=kind != "float64"):
                objective = model(batch, LossSettings(coarse=1.0, fine=[1.0, 1.0])).objective
            objective.backward()
            gradients[kind] = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
        for kind, found in errors.items():
            found.append(float((gradients[kind] - gradients["float64"]).norm() / gradients["float64"].norm()))
    plain, compiled = (float(np.exp(np.log(found).mean())) for found in errors.values())
    assert plain > 0.005
    assert compiled < 1.15 * plain, (plain, compiled)
