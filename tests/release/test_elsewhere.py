"""The model elsewhere than in torch's fp32: ONNX graphs in onnxruntime, and 8-bit weights."""

import contextlib
import io
import logging
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from fvlm_core.data.batch import pack
from fvlm_core.errors import UserError
from fvlm_core.model.inference import generate, logits
from fvlm_core.release.int8 import Int8Linear, int8_weights, weight_bytes
from fvlm_core.release.onnx_export import export_onnx
from tests.model.build import CHAT, FRAME_PX, built, tiny_model, tiny_settings
from tests.model.build import sample as make_sample
from tests.model.build_glance import glance_model

pytestmark = pytest.mark.slow(reason="exports")


@pytest.fixture(scope="module")
def model():
    """As few layers as there are kinds: the encoder's last one is read, and not finished."""
    return built(tiny_settings().with_changes({"vision.shape.layers": 2, "llm.shape.layers": 1})).float()


@pytest.fixture(scope="module")
def graphs(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("torch").addHandler(handler)
    with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        warnings.simplefilter("error")
        written = export_onnx(model, folder)
    logging.getLogger("torch").removeHandler(handler)
    assert said.getvalue() == "", "nothing that a user cannot act on"
    assert [path.name for path in written] == ["read.onnx", "queries.onnx", "coarse.onnx", "fine.onnx"]
    return folder


@pytest.mark.parametrize("frames", [1, 2, 11])
def test_frames_are_read_as_in_torch(model, graphs, frames):
    """Any number of them; torch reads them in parts."""
    rng = np.random.default_rng(frames)
    pixels = rng.integers(0, 256, (frames, FRAME_PX, FRAME_PX, 3), dtype=np.uint8)
    queries = rng.normal(size=(frames, 1, 32)).astype(np.float32)
    (tokens,) = onnxruntime.InferenceSession(graphs / "read.onnx").run(None, {"frames": pixels, "queries": queries})
    with torch.no_grad():
        wanted = model.read(model.encode(torch.from_numpy(pixels)), torch.from_numpy(queries)).tokens
    np.testing.assert_allclose(tokens, wanted.numpy(), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(("mode", "file"), [("coarse_only", "coarse.onnx"), ("coarse_fine", "fine.onnx")])
@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("question_first", [True, False])
def test_the_modes_are_those_of_torch(model, graphs, mode, file, frames, question_first):
    batch = pack([make_sample(np.random.default_rng(frames), frames=frames, question_first=question_first)], CHAT)
    inputs = {"frames": batch.frames, "input_ids": batch.input_ids, "visual_positions": batch.visual_positions.flatten()}
    if mode == "coarse_fine":
        inputs["query_sources"] = batch.query_sources
    (found,) = onnxruntime.InferenceSession(graphs / file).run(None, {name: part.numpy() for name, part in inputs.items()})
    np.testing.assert_allclose(found, logits(model, batch, mode).numpy(), atol=2e-3, rtol=1e-3)


def test_queries_are_made_as_in_torch(model, graphs):
    hidden = np.random.default_rng(0).normal(size=(3, 1, 48)).astype(np.float32)
    found = onnxruntime.InferenceSession(graphs / "queries.onnx").run(None, {"hidden": hidden})
    wanted = model.connector.next_queries(torch.from_numpy(hidden)), model.connector.q_static, model.connector.q_init
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other.detach().numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (partial(tiny_model, query="pooled"), "pools its patches"),
        (partial(tiny_model, query="random"), "queries at random"),
        (glance_model, "chooses which patches"),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path, make, why):
    with pytest.raises(UserError, match=why):
        export_onnx(make(), tmp_path / "graphs")
    assert not (tmp_path / "graphs").exists()


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_an_int8_layer_is_its_rounded_weights(rows):
    """At most half a step from the weights; the kernel for few rows rounds them to bf16 too."""
    linear = torch.nn.Linear(96, 40)
    layer, x = Int8Linear(linear), torch.randn(2, rows, 96)[:1]
    steps = linear.weight.abs().amax(1, keepdim=True) / 127
    assert ((layer.weight - linear.weight).abs() <= 0.501 * steps).all()
    with torch.no_grad():
        wanted = torch.nn.functional.linear(x, layer.weight, linear.bias)
        torch.testing.assert_close(layer(x), wanted, atol=1e-5 if rows > 16 else 0.03, rtol=1e-5)


def test_int8_weights_are_smaller_and_nearly_the_same():
    model = tiny_model().float()
    small = int8_weights(model)
    batch = pack([make_sample(np.random.default_rng(n), frames=3, question_first=bool(n)) for n in range(2)], CHAT)
    for mode in model.modes:
        wanted, found = logits(model, batch, mode), logits(small, batch, mode)
        assert 0 < (found - wanted).norm() / wanted.norm() < 0.05
        assert len(generate(small, batch, mode, max_new_tokens=3, stop_ids=[])) == 2
    assert weight_bytes(small) < 0.6 * weight_bytes(model)
