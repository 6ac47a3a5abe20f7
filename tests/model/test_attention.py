"""The packed kernel's side of attention, which a CPU does not have: what it is given, with a stand-in that computes the same."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fvlm_core.config import LossSettings
from fvlm_core.data.batch import PackedBatch, pack
from fvlm_core.model import attention, llama
from fvlm_core.model.attention import PackedCache, PackedLayout, attend
from fvlm_core.model.inference import continue_greedily, read_batch
from tests.model.build import CHAT, sample, tiny_model


def mixed_batch() -> PackedBatch:
    rng = np.random.default_rng(0)
    return pack([sample(rng, frames=frames, question_first=frames % 2 == 0) for frames in (3, 2, 0, 4)], CHAT)


@pytest.fixture
def kernel(monkeypatch):
    """Flash attention by SDPA, where its conditions hold but for the device; the calls it got."""
    calls = []

    def flash_attention(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, seqused_k=None):
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16
        assert cu_q.dtype == cu_k.dtype == torch.int32
        new = cu_q.diff().tolist()
        held = new if seqused_k is None else seqused_k.tolist()
        assert (cu_q is cu_k) == (seqused_k is None)
        assert (max_q, max_k) == (max(new), max(held))
        assert sum(new) == len(query)
        assert cu_k[-1] == len(key) == len(value)
        calls.append(cu_q)
        outs = []
        for first, n, start, t in zip(cu_q.tolist(), new, cu_k.tolist(), held, strict=False):
            assert n <= t
            q, k, v = (part.transpose(0, 1)[None] for part in (query[first : first + n], key[start : start + t], value[start : start + t]))
            mask = torch.ones(n, t, dtype=torch.bool).tril(t - n)
            outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outs)

    monkeypatch.setattr(attention, "flash_attention", flash_attention)
    monkeypatch.setattr(llama, "has_packed_kernel", lambda _device, dtype, _head_dim: dtype in (torch.bfloat16, torch.float16))
    return calls


def test_under_autocast_the_kernel_gets_bf16_and_its_starts_are_made_once_a_pass(kernel):
    """Rotary embeddings are fp32: without care, queries and keys would be too, and the kernel never be used."""
    model = tiny_model().float()
    batch = mixed_batch()
    with torch.autocast("cpu", torch.bfloat16):
        model(batch, LossSettings(coarse=1.0, fine=[1.0] * model.settings.fine_iterations)).objective.backward()
    passes, layers = 1 + model.settings.fine_iterations, len(model.llm.model.layers)
    text_only = any(not count for count in batch.shown_counts)
    assert len(kernel) == (passes + text_only) * layers
    assert len({id(starts) for starts in kernel}) == passes + text_only
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_without_autocast_it_is_not_asked(kernel):
    model = tiny_model().float()
    model(mixed_batch(), LossSettings(coarse=1.0, fine=[1.0] * model.settings.fine_iterations))
    assert not kernel


@pytest.mark.parametrize("mode", ["coarse_fine", "autoregressive"])
def test_with_a_cache_one_call_a_layer_takes_samples_of_any_length(kernel, monkeypatch, mode):
    """Frame by frame and token by token, samples that have ended among them: what the loop over the samples gives."""
    model = tiny_model().float()
    batch = pack([sample(np.random.default_rng(n), frames=frames) for n, frames in enumerate((3, 1, 4))], CHAT)
    reads = []
    for packed in (True, False):
        monkeypatch.setattr(llama, "has_packed_kernel", lambda *_, packed=packed: packed)
        with torch.autocast("cpu", torch.bfloat16):
            context = read_batch(model, batch, mode, room=6)
            answers = continue_greedily(
                model, context.cache, context.hidden[batch.cu_seqlens[1:].long() - 1], max_new_tokens=6, stop_ids=[]
            )
        reads.append((context.hidden, answers))
        if packed:
            steps = {"coarse_fine": 2, "autoregressive": 4}[mode] + 5
            assert len(kernel) == steps * len(model.llm.model.layers)
            assert len({id(starts) for starts in kernel}) == steps
    (ours, said), (expected, said_by_loop) = reads
    torch.testing.assert_close(ours, expected, atol=0.1, rtol=0.02)
    assert said == said_by_loop


def test_equal_samples_in_a_cache_are_one_product(monkeypatch):
    """On a CPU, and to rounding the same as one by one."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3 * 4, 4, 8), torch.randn(3 * 4, 2, 8), torch.randn(3 * 4, 2, 8)
    together, apart = PackedCache([6, 6, 6]), [PackedCache([6]) for _ in range(3)]
    calls = []
    product = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **options: calls.append(len(args[0])) or product(*args, **options))
    for part in (slice(0, 3), slice(3, 4)):
        held = [tensor.unflatten(0, (3, 4))[:, part] for tensor in (query, key, value)]
        layout = PackedLayout([part.stop - part.start] * 3, together)
        ours = attend(*(tensor.flatten(0, 1) for tensor in held), layout, None, layer=0)
        together.advance(layout)
        assert calls.pop() == 3
        assert not calls
        for n, cache in enumerate(apart):
            alone = PackedLayout([part.stop - part.start], cache)
            expected = attend(*(tensor[n] for tensor in held), alone, None, layer=0)
            cache.advance(alone)
            torch.testing.assert_close(ours.unflatten(0, (3, -1))[n], expected, atol=1e-6, rtol=1e-5)
        calls.clear()
