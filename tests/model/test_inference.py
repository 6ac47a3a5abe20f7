"""The three modes at inference: cached equals recomputed, a batch equals its samples alone."""

import numpy as np
import pytest
import torch

from fvlm_core.data.batch import Sample, Turn, pack
from fvlm_core.model.inference import gaze, generate, logits, read_batch, token_losses
from fvlm_core.model.names import MODES
from tests.model.build import CHAT, mixed, sample, tiny_model


@pytest.mark.parametrize("query", ["deep", "shallow", "random"])
@pytest.mark.parametrize("k", [1, 4])
def test_autoregressive_with_a_cache_equals_recomputed_from_scratch(query, k):
    """Every query, made anew from a whole forward over the tokens before it, gives the token that the cached run gave."""
    model = tiny_model(query=query, tokens_per_frame=k)
    batch = pack(mixed(np.random.default_rng(1)), CHAT, tokens_per_frame=k)
    cached = read_batch(model, batch, "autoregressive")
    features = model.encode(batch.frames)
    tokens = torch.zeros_like(cached.tokens)
    for _ in range(max(batch.shown_counts) + 1):  # each round makes one more frame of every sample right
        hidden = _plain_forward(model, batch, tokens)
        tokens = model.read_fine(features, model.queries(hidden, batch), batch).tokens
    close = {"rtol": 1e-5, "atol": 1e-5}  # eager attention takes its softmax in fp32
    torch.testing.assert_close(cached.tokens, tokens, **close)
    torch.testing.assert_close(cached.hidden, _plain_forward(model, batch, tokens), **close)


def _plain_forward(model, batch, tokens):
    """Hidden states by transformers' own eager attention, sample by sample, without packing or cache."""
    embeddings = model.embed(batch.input_ids).index_copy(0, batch.visual_positions.flatten(), tokens.flatten(0, 1))
    llm = model.llm.to_transformers()
    llm.set_attn_implementation("eager")
    with torch.no_grad():
        parts = [llm.model(inputs_embeds=part[None]).last_hidden_state[0] for part in embeddings.split(batch.lengths)]
    return torch.cat(parts)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", [1, 4])
def test_a_sample_does_not_depend_on_its_batch(mode, k):
    model = tiny_model(tokens_per_frame=k)
    samples = mixed(np.random.default_rng(2))
    together = logits(model, pack(samples, CHAT, tokens_per_frame=k), mode)
    alone = torch.cat([logits(model, pack([s], CHAT, tokens_per_frame=k), mode) for s in samples])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("mode", MODES)
def test_greedy_answers_equal_recomputation(mode):
    """Cached generation of a whole batch against one sample at a time, its sequence run from scratch for every token."""
    model = tiny_model()
    rng = np.random.default_rng(3)
    open_ended = [
        Sample(s.key, s.source, s.frames, s.media, [Turn(s.turns[0].question_ids, [])], s.question_first)
        for s in (sample(rng, frames=3, question_first=True), sample(rng, frames=5), sample(rng, frames=0), sample(rng, frames=1))
    ]
    answers = generate(model, pack(open_ended, CHAT), mode, max_new_tokens=6, stop_ids=[11])
    for one, answer in zip(open_ended, answers, strict=True):
        expected: list[int] = []
        while len(expected) < 6:
            turn = Turn(one.turns[0].question_ids, expected)
            grown = pack([Sample(one.key, one.source, one.frames, one.media, [turn], one.question_first)], CHAT)
            last = -1 - len(CHAT.assistant_close) if expected else -1
            token = int(logits(model, grown, mode)[last].argmax())
            if token == 11:
                break
            expected.append(token)
        assert answer == expected


def test_gaze_adds_up_to_one_over_the_patches():
    model = tiny_model(tokens_per_frame=4)
    batch = pack(mixed(np.random.default_rng(4)), CHAT, tokens_per_frame=4)
    for mode in MODES:
        maps = gaze(model, batch, mode)
        assert maps.shape == (len(batch.shown_frames), 4, 3, 3)
        torch.testing.assert_close(maps.sum((-1, -2)), torch.ones(maps.shape[:2]), check_dtype=False)
    with pytest.raises(ValueError, match="has no attention maps"):
        gaze(tiny_model(query="pooled"), pack(mixed(np.random.default_rng(4)), CHAT), "coarse_only")


def test_token_losses_are_in_position_order():
    model = tiny_model()
    samples = mixed(np.random.default_rng(5))
    batch = pack(samples, CHAT)
    for mode in MODES:
        alone = torch.cat([token_losses(model, pack([s], CHAT), mode) for s in samples])
        assert len(alone) == batch.n_labels
        torch.testing.assert_close(token_losses(model, batch, mode), alone, rtol=1e-5, atol=1e-5)


def test_pooled_models_have_only_the_coarse_mode():
    with pytest.raises(ValueError, match="has no mode 'coarse_fine', only coarse_only"):
        read_batch(tiny_model(query="pooled"), pack([sample(np.random.default_rng(6))], CHAT), "coarse_fine")
