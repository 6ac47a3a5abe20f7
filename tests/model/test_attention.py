"""The packed kernel's side of attention, which a CPU does not have: what it is given, with a stand-in that computes the same."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fvlm_core.config import LossSettings
from fvlm_core.data.batch import PackedBatch, pack
from fvlm_core.model import attention, llama
from tests.model.build import CHAT, sample, tiny_model


def mixed_batch() -> PackedBatch:
    rng = np.random.default_rng(0)
    return pack([sample(rng, frames=frames, question_first=frames % 2 == 0) for frames in (3, 2, 0, 4)], CHAT)


@pytest.fixture
def kernel(monkeypatch):
    """`varlen_attn` by SDPA, where its conditions hold but for the device; the calls it got."""
    calls = []

    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16
        assert cu_q is cu_k
        assert cu_q.dtype == torch.int32
        assert (window_size, enable_gqa) == ((-1, 0), True)
        lengths = cu_q.diff().tolist()
        assert max_q == max_k == max(lengths)
        assert sum(lengths) == len(query) == len(key)
        calls.append(cu_q)
        parts = zip(*(part.transpose(0, 1).split(lengths, dim=1) for part in (query, key, value)), strict=True)
        outs = [F.scaled_dot_product_attention(*(p[None] for p in part), is_causal=True, scale=scale, enable_gqa=True)[0] for part in parts]
        return torch.cat(outs, dim=1).transpose(0, 1)

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
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
