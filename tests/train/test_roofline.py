"""The step without numbers: it asks the device for none, and the roofline counts what it does."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kernels import Kind, Operation, kernels
from benchmarks.roofline import Traced, rows, trace, videos
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
    products = sum(operation.flops for operation in traced.operations if not operation.name.startswith("_flash_attention"))
    assert sum(operation.flops for operation in traced.operations) <= traced.model_flops
    assert products == pytest.approx(traced.model_flops, rel=0.05)


def test_compiled_moves_fewer_bytes_in_fewer_kernels(settings: ModelSettings, traced: Traced) -> None:
    as_compiled = trace(settings, groups=1, compiled=True)
    traces: dict[Kind, Traced] = {"eager": traced, "compiled": as_compiled, "autotuned": as_compiled}
    made = {kind: [k for k in kernels(t.operations, kind=kind) if k.part != "other"] for kind, t in traces.items()}
    eager, compiled, autotuned = ((len(kind), sum(kernel.bytes for kernel in kind)) for kind in made.values())
    flops = [sum(kernel.flops for kernel in kind) for kind in made.values()]
    assert flops == pytest.approx([flops[0]] * 3, rel=0.01)  # compiled, a single query's attention is no product
    assert compiled[0] < 0.6 * eager[0]
    assert compiled[1] < 0.8 * eager[1]
    assert autotuned < compiled
    assert autotuned[1] < compiled[1]
    for card in ("A100", "H100"):
        steps = {row.kind: row for row in rows("tiny", card, traces) if row.part == "step"}
        assert steps["autotuned"].ms < steps["compiled"].ms < steps["eager"].ms


def operation(
    name: str, reads: dict[int, int], writes: dict[int, int], *, backward: bool = False, flops: float = 0.0, over_tokens: bool = False
) -> Operation:
    return Operation(name, "part", 1, backward, False, flops, reads, writes, max(writes.values()), over_tokens=over_tokens)


def test_bytes_of_kernels_by_hand() -> None:
    """A product, GELU and a bias' gradient, 100 bytes each: what is made and used within a kernel is not moved."""
    forward = [
        operation("mm", {0: 100, 1: 10}, {2: 100}),
        operation("gelu", {2: 100}, {3: 100}),
        operation("mm", {3: 100, 4: 10}, {5: 100}),
    ]
    backward = [
        operation("mm", {6: 100, 4: 10}, {7: 100}, backward=True),
        operation("gelu_backward", {7: 100, 2: 100}, {8: 100}, backward=True),
        operation("mm", {8: 100, 0: 100}, {9: 10}, backward=True),
        operation("sum", {8: 100}, {10: 1}, backward=True, over_tokens=True),
        operation("mm", {6: 100, 3: 100}, {11: 10}, backward=True),
    ]
    moved = {kind: [k.bytes for k in kernels([*forward, *backward], kind=kind)] for kind in ("eager", "compiled", "autotuned")}
    assert moved["eager"] == [210, 200, 210, 210, 300, 210, 101, 210]
    assert moved["compiled"] == moved["eager"]  # what sums over tokens goes through GELU's gradient another way than what makes it
    # the products write GELU's result beside their own, and its gradient instead of their own
    assert moved["autotuned"] == [310, 210, 310, 210, 101, 210]


def test_sums_over_tokens_by_hand() -> None:
    """A norm's backward (0: gradient, 1: input) gives its weight's gradient and then a scale's and a bias', which need its own result."""
    operations = [
        operation("mul", {0: 100, 1: 100}, {2: 100}, backward=True),
        operation("sum", {2: 100}, {3: 1}, backward=True),  # of rows
        operation("sub", {0: 100, 3: 1}, {4: 100}, backward=True),
        operation("mul", {0: 100, 1: 100}, {5: 100}, backward=True),
        operation("sum", {5: 100}, {6: 1}, backward=True, over_tokens=True),
        operation("mul", {4: 100, 7: 100}, {8: 100}, backward=True),  # only for the next
        operation("sum", {8: 100}, {9: 1}, backward=True, over_tokens=True),
        operation("sum", {4: 100}, {10: 1}, backward=True, over_tokens=True),
        operation("mm", {4: 100}, {11: 100}, backward=True),
    ]
    # the norm and its weight: two read, its result and the weight's gradient; then that result and 7 for both sums
    assert [k.bytes for k in kernels(operations, kind="compiled")] == [301, 202, 200]


def test_what_is_cheaper_to_compute_again_is_not_kept() -> None:
    """A backward that reads a norm's input anyway, and one that would have to read two tensors to make a third again."""
    first = [operation("mul", {0: 100}, {1: 100}), operation("add", {1: 100}, {2: 100}), operation("mm", {2: 100}, {3: 100})]
    again = operation("mul", {0: 100, 1: 100, 3: 100}, {4: 100}, backward=True)
    assert [k.bytes for k in kernels([*first, again], kind="compiled")] == [200, 200, 300]  # 1 is never kept
    two = [operation("mul", {0: 100, 5: 100}, {1: 100}), operation("mm", {1: 100}, {3: 100})]
    read = operation("mul", {1: 100, 3: 100}, {4: 100}, backward=True)
    assert [k.bytes for k in kernels([*two, read], kind="compiled")] == [300, 200, 300]  # 1 is read


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
