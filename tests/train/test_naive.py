"""The ordinary implementation computes the same model: equal logits where samples are, padding after them."""

import numpy as np
import torch

from fvlm_core.config import LossSettings
from fvlm_core.data.batch import IGNORE, pack
from fvlm_core.train.naive import padded
from tests.model.build import CHAT, mixed, tiny_model


def test_padding_changes_no_sample_and_costs_what_it_costs() -> None:
    model = tiny_model().eval()
    batch = pack(mixed(np.random.default_rng(0)), CHAT)
    other = padded(batch)
    longest = max(batch.lengths)
    assert other.lengths == [longest] * batch.n_samples
    assert other.n_labels == len(other.input_ids) == batch.n_samples * longest
    assert len(other.frames) == len(batch.shown_frames) > len(batch.frames), "an image shown often is encoded often"
    with torch.no_grad():
        features = [model.encode(one.frames) for one in (batch, other)]
        read = [model.read_coarse(f, one).tokens for f, one in zip(features, (batch, other), strict=True)]
    torch.testing.assert_close(read[0], read[1])
    for number, (start, length) in enumerate(zip(batch.cu_seqlens.tolist(), batch.lengths, strict=False)):
        here = slice(number * longest, number * longest + length)
        assert other.input_ids[here].tolist() == batch.input_ids[start : start + length].tolist()
        ours, theirs = batch.labels[start : start + length], other.labels[here]
        assert theirs[ours != IGNORE].tolist() == ours[ours != IGNORE].tolist()


def test_a_padded_step_has_a_gradient_everywhere() -> None:
    model = tiny_model()
    batch = padded(pack(mixed(np.random.default_rng(1)), CHAT))
    found = model(batch, LossSettings())
    found.objective.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
