"""Sampling and beam search against brute force on a tiny random model."""

from itertools import product

import numpy as np
import pytest
import torch

from fvlm_core.config import LLMSettings, LLMShape, ModelSettings, VisionSettings, VisionShape
from fvlm_core.data.batch import ChatFormat, PackedBatch, Sample, Turn, pack
from fvlm_core.model.build import build_model
from fvlm_core.model.decoding import branch, continue_sampling, continue_with_beams, nucleus
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.inference import continue_greedily, logits, read_batch

VOCABULARY, STOP, MOST = 7, 0, 3
CHAT = ChatFormat(system=[1], user_open=[2], user_close=[3], assistant_open=[4], assistant_close=[STOP])


@pytest.fixture(scope="module")
def model() -> FoveatedVLM:
    settings = ModelSettings(
        vision=VisionSettings(shape=VisionShape(width=32, layers=2, heads=2, patch_px=14), frame_px=42),
        llm=LLMSettings(shape=LLMShape(width=32, layers=2, heads=2, kv_heads=1, mlp_width=64)),
    )
    return build_model(settings, vocab_size=VOCABULARY, seed=3).eval()


def batch(answers: list[list[int]] | None = None, n: int = 2) -> PackedBatch:
    frames = np.random.default_rng(0).integers(0, 256, (2, 42, 42, 3), dtype=np.uint8)
    turns = [Turn([5, 6][: number + 1], answers[number] if answers else []) for number in range(n)]
    return pack([Sample(str(number), "", frames, [[0, 1][: number + 1]], [turn]) for number, turn in enumerate(turns)], CHAT)


def start(model: FoveatedVLM, room: int = MOST):
    context = read_batch(model, batch(), "coarse_fine", room=room)
    assert context.cache is not None
    return context.cache, context.hidden[batch().cu_seqlens[1:].long() - 1]


def log_likelihood(model: FoveatedVLM, number: int, answer: list[int]) -> float:
    """Of an answer, and of the stop after it unless it is as long as it may be, from one forward pass."""
    ids, placed = [*answer, STOP][:MOST], answer or [5]
    packed = batch([placed, placed])
    scores = logits(model, packed, "coarse_fine").float().log_softmax(-1)
    first = int(packed.cu_seqlens[number + 1]) - len(placed) - 2
    return sum(float(scores[first + place, token]) for place, token in enumerate(ids))


def test_beams_find_the_best_answer_of_all(model: FoveatedVLM):
    """As many beams as there are prefixes: nothing is cut off, so it is the exhaustive search, of finished answers and of those that the
    greatest length ends."""
    cache, hidden = start(model)
    found = continue_with_beams(model, cache, hidden, max_new_tokens=MOST, stop_ids=[STOP], beams=10**4, length_penalty=1.0)
    tokens = [token for token in range(VOCABULARY) if token != STOP]
    every = [list(answer) for length in range(MOST + 1) for answer in product(tokens, repeat=length)]
    for number in range(2):
        best = max(every, key=lambda answer: log_likelihood(model, number, answer) / min(len(answer) + 1, MOST))
        assert found[number] == best


def test_one_beam_is_greedy_where_greedy_stops(model: FoveatedVLM):
    cache, hidden = start(model, 8)
    greedy = continue_greedily(model, branch(cache, [0, 1], [8, 8]), hidden, max_new_tokens=8, stop_ids=[STOP])
    beam = continue_with_beams(model, cache, hidden, max_new_tokens=8, stop_ids=[STOP], beams=1)
    for ours, theirs in zip(beam, greedy, strict=True):
        assert theirs[: len(ours)] == ours


def test_a_cold_or_narrow_sample_is_greedy(model: FoveatedVLM):
    cache, hidden = start(model)
    greedy = continue_greedily(model, branch(cache, [0, 1], [MOST] * 2), hidden, max_new_tokens=MOST, stop_ids=[STOP])
    for options in ({"temperature": 1e-3}, {"top_p": 1e-6}):
        made = continue_sampling(
            model, branch(cache, [0, 1], [MOST] * 2), hidden, max_new_tokens=MOST, stop_ids=[STOP], seeds=[0, 1], **options
        )
        assert made == greedy


def test_samples_come_as_often_as_they_are_likely(model: FoveatedVLM):
    cache, hidden = start(model)
    probabilities = model.llm.lm_head(hidden[:1]).float().softmax(-1)[0].detach().numpy()
    counts = np.zeros(VOCABULARY)
    for seed in range(600):
        (one, _) = continue_sampling(model, cache, hidden, max_new_tokens=1, stop_ids=[], seeds=[7 * seed, 7 * seed + 1])
        counts[one[0]] += 1
    assert counts / 600 == pytest.approx(probabilities, abs=0.07)


def test_a_samples_answer_does_not_depend_on_its_batch(model: FoveatedVLM):
    cache, hidden = start(model)
    both = continue_sampling(model, branch(cache, [0, 1], [MOST] * 2), hidden, max_new_tokens=MOST, stop_ids=[STOP], seeds=[5, 6])
    alone = continue_sampling(model, branch(cache, [0], [MOST]), hidden[:1], max_new_tokens=MOST, stop_ids=[STOP], seeds=[5])
    assert both[0] == alone[0]


def test_the_nucleus_is_the_smallest_set_that_reaches_its_share():
    found = nucleus(torch.tensor([[0.1, 0.5, 0.3, 0.1]]), 0.7)
    assert found[0].tolist() == pytest.approx([0, 0.625, 0.375, 0])
    assert nucleus(torch.tensor([[0.2, 0.8]]), 1.0)[0].tolist() == pytest.approx([0.2, 0.8])
    with pytest.raises(ValueError, match="must be above 0"):
        continue_sampling(None, None, torch.zeros(1, 1), max_new_tokens=1, stop_ids=[], seeds=[0], temperature=0)


def test_branches_leave_the_cache_as_it_was(model: FoveatedVLM):
    cache, hidden = start(model)
    before = [part.clone() for buffers in cache.layers.values() for part in buffers]
    continue_greedily(model, branch(cache, [1, 0, 1], [MOST] * 3), hidden[[1, 0, 1]], max_new_tokens=MOST, stop_ids=[])
    assert all(torch.equal(a, b) for a, b in zip(before, (p for buffers in cache.layers.values() for p in buffers), strict=True))
