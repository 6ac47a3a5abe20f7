"""Models made from checkpoints and shapes, saved, and loaded again."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fvlm_core.config import LLMSettings, LossSettings, VisionSettings
from fvlm_core.data.batch import IGNORE, pack
from fvlm_core.errors import UserError
from fvlm_core.model.build import build_model, load_model, save_model
from fvlm_core.model.inference import logits
from tests.model.build import CHAT, VARIANTS, VOCAB, mixed, sample, tiny_model, tiny_settings


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_saved_model_loads_with_equal_logits(variant, tmp_path):
    model = tiny_model(**variant).float()
    save_model(model, tmp_path / "model")
    batch = pack(mixed(np.random.default_rng(9)), CHAT, tokens_per_frame=model.settings.tokens_per_frame)
    again = load_model(tmp_path / "model").eval()
    for mode in model.modes:
        assert torch.equal(logits(again, batch, mode), logits(model, batch, mode))


def test_checkpoints_of_transformers_load(tmp_path):
    """Backbones saved by transformers come back with equal outputs; text-only logits are Llama's own."""
    model = tiny_model().float()
    model.encoder.to_dinov2().save_pretrained(tmp_path / "dinov2")
    model.llm.to_transformers().save_pretrained(tmp_path / "llm")
    vision = VisionSettings(checkpoint=str(tmp_path / "dinov2"), frame_px=42)
    loaded = build_model(
        tiny_settings().model_copy(update={"vision": vision, "llm": LLMSettings(checkpoint=str(tmp_path / "llm"))}), vocab_size=VOCAB
    ).eval()
    for name, parameter in loaded.named_parameters():
        if model.role(name) != "connector":
            assert torch.equal(parameter, model.get_parameter(name)), name
    text = pack([sample(np.random.default_rng(10), frames=0, answer=8)], CHAT)
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "llm", attn_implementation="eager").eval()
    with torch.no_grad():
        expected = reference(input_ids=text.input_ids[None]).logits[0]
    torch.testing.assert_close(logits(loaded, text, "coarse_only"), expected, atol=1e-5, rtol=1e-5)


def test_the_first_layers_of_a_checkpoint_are_a_size_of_its_own(tmp_path):
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    theirs = LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path / "llm")
    cut = tiny_settings().model_copy(update={"llm": LLMSettings(checkpoint=str(tmp_path / "llm"), layers=2)})
    model = build_model(cut, vocab_size=VOCAB)
    assert len(model.llm.model.layers) == model.llm.config.num_hidden_layers == 2
    kept = theirs.state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(model.llm.state_dict()["model.layers.1.mlp.up_proj.weight"], kept)
    save_model(model, tmp_path / "saved")
    assert len(load_model(tmp_path / "saved").llm.model.layers) == 2
    with pytest.raises(UserError, match="cannot keep 4 of 3 layers"):
        build_model(cut.model_copy(update={"llm": LLMSettings(checkpoint=str(tmp_path / "llm"), layers=4)}), vocab_size=VOCAB)
    with pytest.raises(ValueError, match="layers applies to a checkpoint only"):
        LLMSettings(shape=tiny_settings().llm.shape, layers=1)


def test_what_cannot_be_loaded_is_an_error_never_a_random_model(tmp_path):
    for update in (
        {"llm": LLMSettings(checkpoint="nobody/no-such-model")},
        {"vision": VisionSettings(checkpoint=str(tmp_path), frame_px=42)},
    ):
        with pytest.raises(UserError, match="cannot load"):
            build_model(tiny_settings().model_copy(update=update), vocab_size=VOCAB)
    model = tiny_model().float()
    model.llm.to_transformers().save_pretrained(tmp_path / "llm")
    with pytest.raises(UserError, match="97"):
        build_model(tiny_settings().model_copy(update={"llm": LLMSettings(checkpoint=str(tmp_path / "llm"))}), vocab_size=500)


def test_a_saved_model_does_not_say_where_its_backbones_were(tmp_path):
    digests = []
    for place in ("here", "there"):
        folder = tmp_path / place / "dinov2"
        tiny_model().float().encoder.to_dinov2().save_pretrained(folder)
        vision = VisionSettings(checkpoint=str(folder), frame_px=42)
        saved = tmp_path / place / "model"
        save_model(build_model(tiny_settings().model_copy(update={"vision": vision}), vocab_size=VOCAB), saved)
        digests.append((saved / "settings.yaml").read_bytes())
    assert digests[0] == digests[1]
    assert b"dinov2" in digests[0]
    assert str(tmp_path).encode() not in digests[0]


@pytest.mark.parametrize("tied", [True, False])
def test_the_padding_tokens_embedding_learns(tied, tmp_path):
    """SmolLM2's configuration names its end-of-turn token for padding, and torch gives a padding token's embedding no gradient."""
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = LlamaConfig(vocab_size=VOCAB, pad_token_id=2, eos_token_id=2, tie_word_embeddings=tied, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llm")
    settings = tiny_settings().model_copy(update={"llm": LLMSettings(checkpoint=str(tmp_path / "llm"))})
    built = build_model(settings, vocab_size=VOCAB)
    save_model(built, tmp_path / "model")
    batch = pack([sample(np.random.default_rng(0), frames=0)], CHAT)
    assert (batch.input_ids == 2).sum() == 1
    expected = embedding_gradient(tmp_path / "llm", batch.input_ids, batch.labels)
    assert expected[2].norm() > 0.1
    for model in (built, load_model(tmp_path / "model")):
        model(batch, LossSettings()).objective.backward()
        torch.testing.assert_close(model.llm.model.embed_tokens.weight.grad, expected, atol=1e-5, rtol=1e-4)


def embedding_gradient(checkpoint: Path, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The gradient of transformers' own Llama with a plain look-up in a table, which is the output's too where tied."""
    llm = LlamaForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    table = llm.model.embed_tokens.weight.detach().clone().requires_grad_()
    output = table if llm.config.tie_word_embeddings else llm.lm_head.weight
    hidden = llm.model(inputs_embeds=F.embedding(ids, table)[None]).last_hidden_state[0]
    F.cross_entropy(F.linear(hidden, output), labels, ignore_index=IGNORE, reduction="sum").backward()
    assert table.grad is not None
    return table.grad
