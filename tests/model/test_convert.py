"""The converter, against the original's function written out with transformers' own modules."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fvlm_core.config import LossSettings
from fvlm_core.data.batch import IGNORE, ChatFormat, pack
from fvlm_core.errors import UserError
from fvlm_core.model.build import build_model
from fvlm_core.model.convert import VISUAL_SCALE, load_original, to_original
from fvlm_core.model.encoder import PIXEL_MEAN, PIXEL_STD
from fvlm_core.model.inference import logits, read_batch
from tests.model.build import VOCAB, sample, tiny_model, tiny_settings

NO_TEMPLATE = ChatFormat(system=[], user_open=[], user_close=[], assistant_open=[], assistant_close=[2])


def original_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A checkpoint in the original's layout, with an output projection that is not the identity."""
    state = to_original(tiny_model().float())
    generator = torch.Generator().manual_seed(seed)
    for name in ("encoder.output_proj.weight", "encoder.output_proj.bias", "dino_to_llm.bias", "llm_to_query.bias"):
        state[name] = torch.randn(state[name].shape, generator=generator) * 0.3
    return state


def original_tokens(model, state, frames: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """The original's visual tokens [T, llm width] of frames [T, H, W, 3] and queries [T, D]: every layer's keys and values are
    projected from the hidden states that transformers gives out."""
    dinov2 = model.encoder.to_dinov2().eval()
    pixels = (frames.permute(0, 3, 1, 2) / 255 - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(PIXEL_STD).view(3, 1, 1)
    hidden = dinov2(pixels, output_hidden_states=True).hidden_states
    q = F.linear(queries, state["encoder.query_input_proj.weight"])[:, None]
    for number, x in enumerate(hidden[:-1]):
        prefix = f"encoder.dino.encoder.layer.{number}."
        q = original_layer({name.removeprefix(prefix): p for name, p in state.items() if name.startswith(prefix)}, q, x)
    q = F.layer_norm(q, q.shape[-1:], state["encoder.dino.layernorm.weight"], state["encoder.dino.layernorm.bias"], 1e-6)
    z = F.linear(q[:, 0], state["encoder.output_proj.weight"], state["encoder.output_proj.bias"])
    return VISUAL_SCALE * F.linear(z, state["dino_to_llm.weight"], state["dino_to_llm.bias"])


def original_layer(weights: dict[str, torch.Tensor], q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Queries [T, 1, D] through one DINOv2 layer whose patches enter as x [T, N, D]."""

    def linear(v: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(v, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(v: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(v, v.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def heads(v: torch.Tensor, name: str) -> torch.Tensor:
        return linear(norm(v, "norm1"), f"attention.attention.{name}").unflatten(-1, (2, -1)).transpose(1, 2)

    query, key, value = heads(q, "query"), heads(x, "key"), heads(x, "value")
    attended = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1) @ value
    q = q + linear(attended.transpose(1, 2).flatten(2), "attention.output.dense") * weights["layer_scale1.lambda1"]
    return q + linear(F.gelu(linear(norm(q, "norm2"), "mlp.fc1")), "mlp.fc2") * weights["layer_scale2.lambda1"]


@torch.no_grad()
def test_original_weights_have_the_original_function():
    """Coarse pass, queries from its hidden states, fine tokens, logits and loss."""
    state = original_state()
    model = build_model(tiny_settings(fine_iterations=1), vocab_size=VOCAB).eval()
    load_original(model, state)
    one = sample(np.random.default_rng(1), frames=4, question=5)
    batch = pack([one], NO_TEMPLATE)
    frames = torch.from_numpy(one.frames)
    coarse = original_tokens(model, state, frames, state["q_static"].expand(4, -1))
    torch.testing.assert_close(read_batch(model, batch, "coarse_only").tokens[:, 0], coarse, atol=1e-5, rtol=1e-5)
    model.llm.set_attn_implementation("eager")
    text = model.embed(batch.input_ids[4:])
    hidden = model.llm.model(inputs_embeds=torch.cat([coarse, text])[None]).last_hidden_state[0]
    made = F.linear(hidden[:3], state["llm_to_query.weight"], state["llm_to_query.bias"])
    fine = original_tokens(model, state, frames, torch.cat([state["q_init"], made]))
    expected = model.llm(inputs_embeds=torch.cat([fine, text])[None]).logits[0]
    model.llm.set_attn_implementation("fvlm_packed")
    torch.testing.assert_close(logits(model, batch, "coarse_fine"), expected, atol=1e-4, rtol=1e-4)
    kept = batch.labels != IGNORE
    loss = model(batch, LossSettings(coarse=0.0, fine=[1.0])).objective / batch.n_labels
    torch.testing.assert_close(loss, F.cross_entropy(expected[kept], batch.labels[kept]), atol=1e-5, rtol=1e-5)


def test_there_and_back_is_the_same_function():
    state = original_state()
    first, second = (build_model(tiny_settings(fine_iterations=1), vocab_size=VOCAB).eval() for _ in range(2))
    load_original(first, state)
    back = to_original(first)
    assert set(back) == set(state)
    load_original(second, back)
    batch = pack([sample(np.random.default_rng(2), frames=3, question_first=True)], NO_TEMPLATE)
    torch.testing.assert_close(logits(second, batch, "autoregressive"), logits(first, batch, "autoregressive"), atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="deep queries, one token per frame"):
        to_original(tiny_model(tokens_per_frame=4))
    state = original_state()
    del state["llm_to_query.bias"]
    with pytest.raises(UserError, match="llm_to_query"):
        load_original(build_model(tiny_settings(), vocab_size=VOCAB), state)
