"""The model's training passes: packing changes nothing, gradients are right, queries matter."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlm_core.config import LLMSettings, LLMShape, LossSettings
from fvlm_core.data.batch import IGNORE, pack
from fvlm_core.model.build import build_model
from fvlm_core.model.inference import logits, read_batch
from tests.model.build import CHAT, VARIANTS, VOCAB, checkpointing_changes_no_gradient, losses, mixed, sample, tiny_model, tiny_settings


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_packed_equals_one_by_one(variant):
    """Losses and gradients of a packed batch are the sums over its samples alone."""
    model = tiny_model(**variant)
    samples = mixed(np.random.default_rng(1))
    k = model.settings.tokens_per_frame
    together = model(pack(samples, CHAT, tokens_per_frame=k), losses(model))
    together.objective.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = [model(pack([s], CHAT, tokens_per_frame=k), losses(model)) for s in samples]
    sum(part.objective for part in alone).backward()
    for name in together.sums:
        torch.testing.assert_close(together.sums[name], sum(part.sums[name] for part in alone), check_dtype=False, rtol=1e-6, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_replicas_are_encoded_once_and_equal_frames_too():
    rng = np.random.default_rng(2)
    image = sample(rng, frames=1, shown=[[0] * 8])
    batch = pack([image, image, sample(rng, frames=2)], CHAT)
    assert len(batch.frames) == 3
    assert len(batch.shown_frames) == 18
    assert sorted(group.shown.shape for group in batch.showings) == [(1, 16), (2, 1)]


def test_loss_is_cross_entropy_of_the_logits():
    """The chunk-free loss against plain logits and F.cross_entropy, in the mode a single fine pass is trained for."""
    model = tiny_model(fine_iterations=1)
    batch = pack(mixed(np.random.default_rng(3)), CHAT)
    ours = model(batch, LossSettings(coarse=1.0, fine=[1.0])).sums
    for mode, name in (("coarse_only", "coarse"), ("coarse_fine", "fine1")):
        expected = F.cross_entropy(logits(model, batch, mode), batch.labels, ignore_index=IGNORE, reduction="sum")
        torch.testing.assert_close(ours[name].double(), expected, rtol=1e-6, atol=1e-5)


def test_a_pass_without_a_loss_runs_over_what_queries_need_and_changes_nothing():
    """Dropping the coarse loss leaves the last pass's loss as it was."""
    model = tiny_model()
    batch = pack(mixed(np.random.default_rng(4)), CHAT)
    full = model(batch, LossSettings(coarse=1.0, fine=[1.0, 1.0])).sums["fine2"]
    short = model(batch, LossSettings(coarse=0.0, fine=[0.0, 1.0])).sums["fine2"]
    torch.testing.assert_close(full, short)


def test_labels_are_the_next_tokens():
    batch = pack([sample(np.random.default_rng(5), frames=2, question=3, answer=2)], CHAT)
    places = (batch.labels != IGNORE).nonzero().flatten().tolist()
    assert [batch.labels[p].item() for p in places] == [*batch.input_ids[[p + 1 for p in places]].tolist()]
    assert batch.n_labels == 3  # two answer tokens and the end marker
    assert batch.labels[places[-1]] == CHAT.assistant_close[0]


@settings(max_examples=25, deadline=None)
@given(
    frames=st.integers(0, 5), question=st.integers(1, 6), answer=st.integers(0, 4), first=st.booleans(),
    k=st.sampled_from([1, 4]), turns=st.integers(1, 2),
)  # fmt: skip
def test_layout_properties(frames, question, answer, first, k, turns):
    rng = np.random.default_rng(frames)
    one = sample(rng, frames=frames, question=question, answer=answer, question_first=first, turns=turns)
    batch = pack([one, one], CHAT, tokens_per_frame=k)
    text = 3 + turns * (1 + question + 1 + 1 + (answer + 2 if answer else 0))
    assert batch.lengths == [text + frames * k] * 2
    assert batch.n_labels == 2 * turns * (answer + 1 if answer else 0)
    assert len(batch.visual_positions) == 2 * frames
    sources, places = batch.query_sources, batch.visual_positions
    for shown in range(2 * frames):
        if shown % frames:
            assert torch.equal(sources[shown], places[shown - 1])
        else:
            assert (sources[shown] == (places[shown, 0] - 1 if first else -1)).all()
    assert batch.query_prefix == [max(0, int(sources[:frames].max()) + 1) if frames else 0] * 2


def test_gradient_of_the_query_path():
    """float64 gradcheck from the previous hidden state to the visual token."""
    model = tiny_model()
    batch = pack([sample(np.random.default_rng(6), frames=2, question_first=True)], CHAT)
    features = model.encode(batch.frames)

    def token(hidden):
        return model.read_fine(features, model.queries(hidden, batch), batch).tokens

    hidden = torch.randn(len(batch.labels), 48, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(token, (hidden,), fast_mode=True)


def test_different_queries_read_different_tokens_from_the_start():
    """At initialisation, two queries on one frame differ about as much as the tokens themselves: neither a small start
    nor a bias makes all queries attend alike."""
    torch.manual_seed(8)
    model = build_model(tiny_settings(), vocab_size=VOCAB)
    assert model.connector.query_input_proj.bias is None
    rng = np.random.default_rng(8)
    batch = pack([sample(rng, frames=6)], CHAT)
    queries = model.connector.next_queries(torch.randn(6, 1, 48))
    assert 0.8 < queries.std() < 1.2
    assert 0.8 < model.connector.query_input_proj(queries).std() < 1.2
    features = model.encode(batch.frames)
    first = model.read_fine(features, queries, batch, weights=True)
    second = model.read_fine(features, queries.flip(0), batch, weights=True)
    assert (first.tokens - second.tokens).std() > 0.5 * first.tokens.std()
    assert (first.weights - second.weights).abs().sum(-1).mean() > 0.05
    assert abs(first.tokens.std() / model.settings.visual_scale - 1) < 0.3


def test_roles_cover_every_parameter_and_decay_only_matrices():
    model = tiny_model(tokens_per_frame=4, film_head_width=4)
    roles = {name: model.role(name) for name, _ in model.named_parameters()}
    assert set(roles.values()) == {"connector", "vision", "llm"}
    kept = {name.rsplit(".", 1)[-1] for name in roles if model.no_decay(name)}
    assert kept == {"bias", "weight", "scale1", "scale2", "q_static", "q_init", "q_slot", "cls_token", "position_embeddings"}
    assert not model.no_decay("llm.model.layers.0.mlp.up_proj.weight")
    assert model.no_decay("llm.model.norm.weight")


def test_gradient_checkpointing_changes_no_gradient():
    checkpointing_changes_no_gradient(tiny_model(), pack(mixed(np.random.default_rng(11)), CHAT))


def test_rope_of_a_shape_is_what_was_asked_for():
    settings_ = tiny_settings().model_copy(
        update={"llm": LLMSettings(shape=LLMShape(width=48, layers=1, heads=4, kv_heads=2, rope_theta=777.0))}
    )
    model = build_model(settings_, vocab_size=VOCAB)
    expected = 777.0 ** -(torch.arange(0, 12, 2) / 12)
    torch.testing.assert_close(model.llm.model.rotary_emb.inv_freq, expected)


def test_given_queries_all_modes_give_the_same_tokens():
    model = tiny_model()
    batch = pack(mixed(np.random.default_rng(12)), CHAT)
    queries = torch.randn(len(batch.shown_frames), 1, 32, dtype=torch.float64)
    contexts = [read_batch(model, batch, mode, queries=queries) for mode in model.modes]
    for context in contexts[1:]:
        torch.testing.assert_close(context.tokens, contexts[0].tokens)
        torch.testing.assert_close(context.hidden, contexts[0].hidden)


@pytest.mark.parametrize("frames", [0, 3])
@pytest.mark.parametrize("answer", [0, 3])
def test_every_parameter_gets_a_gradient_whatever_the_batch_lacks(frames, answer):
    """DDP hangs or fails on a parameter without one."""
    model = tiny_model(tokens_per_frame=4)
    batch = pack([sample(np.random.default_rng(13), frames=frames, answer=answer, question_first=True)], CHAT, tokens_per_frame=4)
    model(batch, losses(model)).objective.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    if not answer:
        assert all(not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("shown", [[[0, 2]], [[2]], [[0, 2, 0], [2, 2]]])
def test_a_frame_that_is_never_shown_changes_nothing(shown):
    model = tiny_model()
    whole = sample(np.random.default_rng(5), frames=3, shown=shown, question_first=True)
    used = sorted({index for one in shown for index in one})
    without = replace(whole, frames=whole.frames[used], media=[[used.index(index) for index in one] for one in shown])
    losses = [model(pack([one], CHAT), LossSettings()).objective for one in (whole, without)]
    torch.testing.assert_close(*losses)
