"""The step without numbers: it asks the device for none, and the roofline counts what it does."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.roofline import Traced, kernels, rows, trace, videos
from fvlm_core.config import LLMSettings, LLMShape, LossSettings, ModelSettings, VisionSettings, VisionShape
from fvlm_core.model.build import build_model


@pytest.fixture(scope="module")
def settings() -> ModelSettings:
    vision = VisionSettings(shape=VisionShape(width=64, layers=2, heads=2), frame_px=224)
    llm = LLMSettings(shape=LLMShape(width=64, layers=2, heads=4, kv_heads=2, mlp_width=128))
    return ModelSettings(vision=vision, llm=llm, fine_iterations=1)


@pytest.fixture(scope="module")
def traced(settings: ModelSettings) -> Traced:
    return trace(settings, groups=1)


def test_flops_are_those_of_the_configuration(traced: Traced) -> None:
    """But for causal attention, of which the packed kernel computes half."""
    products = sum(operation.flops for operation in traced.operations if operation.name != "_varlen_attn" or not operation.attention)
    assert sum(operation.flops for operation in traced.operations) <= traced.model_flops
    assert products == pytest.approx(traced.model_flops, rel=0.05)


def test_compiled_moves_fewer_bytes_in_fewer_kernels(traced: Traced) -> None:
    kinds = [[k for k in kernels(traced.operations, compiled=compiled) if k.part != "other"] for compiled in (False, True)]
    (eager, eager_bytes), (compiled, compiled_bytes) = ((len(kind), sum(kernel.bytes for kernel in kind)) for kind in kinds)
    assert sum(kernel.flops for kernel in kinds[0]) == sum(kernel.flops for kernel in kinds[1])
    assert compiled < 0.6 * eager
    assert compiled_bytes < 0.8 * eager_bytes
    for card in ("A100", "H100"):
        steps = {row.kind: row for row in rows("tiny", card, traced) if row.part == "step"}
        assert steps["compiled"].ms < steps["eager"].ms


@pytest.mark.parametrize("by_sample", [False, True])
def test_a_forward_and_backward_ask_the_device_for_nothing(settings: ModelSettings, by_sample: bool) -> None:
    """A FakeTensor raises where its numbers are asked for: by a shape that depends on them, or by the host."""
    batch = videos(1)
    model = build_model(settings, vocab_size=49_152)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = batch._map(mode.from_tensor)
        for name, parameter in list(model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(mode.from_tensor(parameter.detach())))
        model(fake, LossSettings(coarse=1.0, fine=[1.0]), by_sample=by_sample).objective.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        with pytest.raises(RuntimeError):
            (fake.labels != -100).nonzero()
