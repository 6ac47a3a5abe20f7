"""Parameter groups cover every parameter exactly once; schedules never waste a step."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fvlm_core.config import OptimizerSettings
from fvlm_core.errors import UserError
from fvlm_core.model.build import build_model
from fvlm_core.train.divergence import FREEZES, frozen_parameters, next_freeze
from fvlm_core.train.optimizer import build_optimizer, clip_gradients, gradient_norms, optimizer_tensors
from fvlm_core.train.schedules import learning_rates
from tests.model.build import tiny_settings

VARIANTS = [
    {},
    {"query": "shallow"},
    {"query": "random"},
    {"query": "pooled", "fine_iterations": 0, "tokens_per_frame": 4},
    {"tokens_per_frame": 16, "film_head_width": 8},
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("freezes", [[], ["vision"], ["vision", "llm_lower"]])
def test_groups_cover_each_trained_parameter_once(variant: dict, freezes: list[str]) -> None:
    model = build_model(tiny_settings(**variant), vocab_size=50)
    frozen = frozen_parameters(model, freezes)
    optimizer = build_optimizer(model, OptimizerSettings(), frozen=frozen)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted({name for name, _ in model.named_parameters()} - frozen)
    assert bool(frozen) == bool(freezes)
    for group in optimizer.param_groups:
        assert {model.role(name) for name in group["param_names"]} == {group["role"]}
        assert {model.no_decay(name) for name in group["param_names"]} == {group["weight_decay"] == 0}
    decayed = {name for group in optimizer.param_groups if group["weight_decay"] for name in group["param_names"]}
    assert not [
        name for name in decayed if "norm" in name or name.endswith((".bias", "cls_token", "position_embeddings", "q_static", "q_init"))
    ]
    assert all(parameter.requires_grad == (name not in frozen) for name, parameter in model.named_parameters())


def test_freezes_come_in_order_and_run_out() -> None:
    model = build_model(tiny_settings(), vocab_size=50)
    build_optimizer(model, OptimizerSettings())
    assert next_freeze(model, []) == FREEZES[0] == "vision"
    lower = frozen_parameters(model, ["llm_lower"])
    layers = {int(name.split(".")[3]) for name in lower}
    assert layers == set(range((len(model.llm.model.layers) + 1) // 2))
    build_optimizer(model, OptimizerSettings(lr_vision=0.0))
    assert next_freeze(model, []) == "llm_lower"
    build_optimizer(model, OptimizerSettings(), frozen=frozen_parameters(model, FREEZES))
    assert next_freeze(model, FREEZES) is None


def test_zero_rate_freezes_and_all_zero_is_an_error() -> None:
    model = build_model(tiny_settings(), vocab_size=50)
    optimizer = build_optimizer(model, OptimizerSettings(lr_vision=0.0))
    assert {group["role"] for group in optimizer.param_groups} == {"connector", "llm"}
    assert not any(p.requires_grad for n, p in model.named_parameters() if model.role(n) == "vision")
    with pytest.raises(UserError, match="nothing to train"):
        build_optimizer(model, OptimizerSettings(lr_vision=0, lr_llm=0, lr_connector=0))


def test_role_without_parameters_is_an_error() -> None:
    model = build_model(tiny_settings(), vocab_size=50)
    del model.encoder
    with pytest.raises(UserError, match="no parameters of the role 'vision'"):
        build_optimizer(model, OptimizerSettings())


rates = st.floats(1e-7, 1e-1)


@given(
    schedule=st.sampled_from(["cosine", "constant", "wsd", "converging"]),
    steps=st.integers(1, 400),
    warmup=st.integers(0, 50),
    final=st.floats(0, 1),
    connector=rates,
    llm=rates,
)
def test_schedules(schedule: str, steps: int, warmup: int, final: float, connector: float, llm: float) -> None:
    settings = OptimizerSettings.model_validate(
        {
            "schedule": schedule,
            "warmup_steps": warmup,
            "final_share": final,
            "lr_connector": connector,
            "lr_llm": llm,
            "lr_vision": 0.0,
        }
    )
    course = [learning_rates(settings, step, steps) for step in range(steps)]
    for role, peak, other in (("connector", connector, llm), ("llm", llm, llm)):
        values = [rates[role] for rates in course]
        assert all(0 < value <= max(peak, other) * (1 + 1e-9) for value in values)
        after = values[max(0, warmup - 1) :]
        if schedule != "converging" or connector > llm:
            assert all(b <= a * (1 + 1e-9) for a, b in pairwise(after)), "falls after the warm-up, or stays"
        if schedule == "constant":
            assert after == pytest.approx([peak] * len(after))
    assert {rates["vision"] for rates in course} == {0.0}
    if schedule == "converging" and steps > max(1, warmup):
        assert course[-1]["connector"] == pytest.approx(llm)
    if schedule in ("cosine", "wsd") and steps > 20 * max(1, warmup):
        assert course[-1]["llm"] <= llm * (final + (1 - final) * 0.2) * (1 + 1e-9)


def test_peak_is_reached_and_wsd_stays() -> None:
    settings = OptimizerSettings(schedule="wsd", warmup_steps=10, final_share=0.0, lr_llm=1.0)
    course = [learning_rates(settings, step, 100)["llm"] for step in range(100)]
    assert course[0] == 0.1
    assert course[9:80] == [1.0] * 71
    assert course[80] < 1
    assert course[99] == pytest.approx(1 / 21)


def test_converging_needs_a_backbone() -> None:
    with pytest.raises(ValidationError, match="'converging' needs a learning rate above 0"):
        OptimizerSettings(schedule="converging", backbone_scale=0)


@pytest.mark.parametrize("clip_norm", [0.5, 100.0])
def test_clipping_in_adamws_kernel_is_clipping_before_it(clip_norm: float) -> None:
    """Weights and moments after two steps, with gradients above the norm and below it."""
    states = []
    for in_step in (False, True):
        model = build_model(tiny_settings(), vocab_size=50)
        optimizer = build_optimizer(model, OptimizerSettings())
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.01
            norm = torch.stack(list(gradient_norms(optimizer).values())).norm()
            assert 0.5 < norm < 100
            clip_gradients(optimizer, clip_norm, norm, in_step=in_step)
            optimizer.step()
        states.append([part for tensors in optimizer_tensors(optimizer).values() for part in tensors.values()] + list(model.parameters()))
    torch.testing.assert_close(*states, atol=1e-6, rtol=1e-5)
