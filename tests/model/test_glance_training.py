"""Training with a glance: the gradient reaches the choice, packing and checkpointing change nothing, a step costs what is counted."""

import numpy as np
import pytest
import torch

from fvlm_core.config import LossSettings
from fvlm_core.data.batch import IGNORE, pack
from fvlm_core.model.flop_counter import count_flops
from fvlm_core.model.flops import ModelDims, SampleShape, sample_flops
from fvlm_core.model.glance import (
    read_with_glance,
    run_to_last_layer,
    selection,
)
from fvlm_core.model.inference import read_batch
from tests.model.build import CHAT, checkpointing_changes_no_gradient, losses, mixed
from tests.model.build_glance import ALL, DEEPEST, everything, frames_of, glance_model, large, packed


@pytest.mark.parametrize("shape", DEEPEST, ids=str)
def test_gradient_reaches_the_choice(shape):
    """By finite differences: p moves with the query, so a gradient that stopped at p would be found wrong."""
    model = glance_model(**shape)
    full = everything(model, frames_of(model, 1))
    chosen, scales = model.settings.glance, model.connector.scale_embeddings.detach()
    assert chosen is not None
    queries = torch.randn(1, 2, 32, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(lambda q: read_with_glance(model.encoder, full, q, chosen, scales).read, (queries,), fast_mode=True)
    entering = run_to_last_layer(model.encoder, full.keys, full.values, queries, 1.0, None)
    p = selection(model.encoder.layers[-1], full.keys[-1], entering, 1.0, None, ALL)
    torch.testing.assert_close(p.sum(-1), torch.ones(1, 2, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(p[0, 0, 0], queries)
    assert gradient[0, 0].abs().max() > 1e-6
    assert not gradient[0, 1].any()


def test_what_a_query_saw_teaches_the_glance():
    """The teaching loss of chosen patches is cross-entropy from where it looked to p: its gradient moves p there."""
    model = glance_model(train_on="chosen", explore=0.0).train()
    batch = packed(model)
    out = model(batch, losses(model))
    quiet = glance_model(train_on="chosen", explore=0.0, distill=0.0).train()(batch, losses(model))
    assert out.sums == quiet.sums
    assert out.objective > quiet.objective
    out.objective.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_noise_explores_in_training_only():
    model = glance_model(train_on="chosen", explore=1.0, open=1)
    features = model.encode(frames_of(model, 8))
    queries = torch.randn(8, 1, 32, dtype=torch.float64)
    twice = [model.eval().read(features, queries).opened for _ in range(2)]
    assert torch.equal(*twice)
    explored = {str(model.train().read(features, queries).opened.tolist()) for _ in range(5)}
    assert len(explored) > 1


@pytest.mark.parametrize("train_on", ["all", "chosen"])
@pytest.mark.parametrize("k", [1, 4])
def test_packed_equals_one_by_one(train_on, k):
    model = glance_model(train_on=train_on, explore=0.0, k=k).train()
    samples = large(mixed(np.random.default_rng(1)), model)
    together = model(pack(samples, CHAT, tokens_per_frame=k), losses(model))
    alone = [model(pack([s], CHAT, tokens_per_frame=k), losses(model)) for s in samples]
    torch.testing.assert_close(together.objective, sum(part.objective for part in alone))
    together.objective.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    sum(part.objective for part in alone).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("frozen", [(), ("vision",)], ids=str)
@pytest.mark.parametrize("train_on", ["all", "chosen"])
@pytest.mark.parametrize("shape", DEEPEST, ids=str)
def test_configuration_says_what_a_step_costs(shape, train_on, frozen):
    model = glance_model(**shape, train_on=train_on).float().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.role(name) not in frozen)
    loss = LossSettings(coarse=1.0, fine=[0.0, 1.0])
    samples = large(mixed(np.random.default_rng(1)), model)
    batch = pack(samples, CHAT)
    dims = ModelDims.from_configs(model.encoder.config.to_dict(), model.llm.config.to_dict(), model.settings.vision.frame_px)
    labels = [int((part != IGNORE).sum()) for part in batch.labels.split(batch.lengths)]
    costs = [
        sample_flops(model.settings, dims, SampleShape(len(s.frames), shown, length - shown, n_labels, prefix), loss, frozen=frozen)
        for s, shown, length, n_labels, prefix in zip(
            samples, batch.shown_counts, batch.label_prefix, labels, batch.query_prefix, strict=True
        )
    ]
    assert sum(c.forward for c in costs) == pytest.approx(count_flops(lambda: model(batch, loss)), rel=0.005)
    assert sum(c.train for c in costs) == pytest.approx(count_flops(lambda: model(batch, loss).objective.backward()), rel=0.02)


def test_checkpointing_changes_no_gradient():
    model = glance_model(train_on="all")
    checkpointing_changes_no_gradient(model, packed(model))


@pytest.mark.parametrize("train_on", ["all", "chosen"])
def test_half_precision_trains(train_on):
    """Under autocast, as on a GPU: attention's bias has the precision of its queries, and the loss is near that of fp32."""
    model = glance_model(train_on=train_on, explore=0.0, open=ALL).float().train()
    batch = packed(model)
    expected = model(batch, losses(model)).objective.item()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(batch, losses(model)).objective
    found.backward()
    assert found.item() == pytest.approx(expected, rel=0.02)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    tokens = read_batch(model, batch, "coarse_fine").tokens
    with torch.autocast("cpu", torch.bfloat16):
        rounded = read_batch(model, batch, "coarse_fine").tokens
    assert (rounded.float() - tokens).norm() < 0.05 * tokens.norm()
