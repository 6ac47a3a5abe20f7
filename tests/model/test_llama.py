"""The language model against transformers' own Llama, with the same weights; and that the compiler takes a layer as one graph."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fvlm_core.config import LLMSettings
from fvlm_core.errors import UserError
from fvlm_core.model import attention, llama
from fvlm_core.model.attention import PackedCache, PackedLayout
from fvlm_core.model.build import build_model
from fvlm_core.model.casts import Casts
from fvlm_core.model.llama import LayerWeights, Llama
from tests.model.build import VOCAB, tiny_settings

LENGTHS = [5, 1, 9, 3]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True},
    {"num_key_value_heads": 1},
    {"num_key_value_heads": 4, "head_dim": 16},
    {"attention_bias": True, "mlp_bias": True},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 130_000.0}, "rms_norm_eps": 1e-3},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}},
    {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}},
]


def transformers_llama(**changes: Any) -> LlamaForCausalLM:
    """With weights far from zero, so that nothing agrees because it is small."""
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    config = LlamaConfig(**{"vocab_size": VOCAB, "max_position_embeddings": 64, "initializer_range": 48**-0.5, **shape, **changes})
    theirs = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return theirs


def packed(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Token ids and positions."""
    return torch.randint(0, VOCAB, (sum(lengths),)), torch.cat([torch.arange(length) for length in lengths])


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_logits_gradients_and_weights_are_those_of_transformers(changes: dict[str, Any]) -> None:
    theirs = transformers_llama(**changes)
    ids, positions = packed(LENGTHS)
    expected = torch.cat([theirs(input_ids=part[None]).logits[0] for part in ids.split(LENGTHS)])
    F.cross_entropy(expected, ids, reduction="sum").backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    ours = Llama.from_transformers(theirs)
    ours.zero_grad()
    logits = ours.lm_head(ours(ours.model.embed_tokens(ids), positions, PackedLayout(LENGTHS)))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    F.cross_entropy(logits, ids, reduction="sum").backward()
    assert dict(ours.named_parameters()).keys() == gradients.keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4, msg=name)
    back = ours.to_transformers().state_dict()
    assert back.keys() == theirs.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_cast_once_for_several_forwards_are_the_same(checkpointing: bool) -> None:
    """In float64, where casting changes nothing: hidden states and gradients."""
    casts = Casts()
    ids, positions = packed(LENGTHS)
    results = []
    for once in (False, True):
        ours = Llama.from_transformers(transformers_llama()).double()
        ours.model.gradient_checkpointing = checkpointing
        cast: list[Any] = [casts(layer.matrices, torch.float64) for layer in ours.model.layers]
        weights = [LayerWeights(*matrices) for matrices in cast] if once else None
        hidden = ours.model.embed_tokens(ids)
        for _ in range(2):
            hidden = ours(hidden, positions, PackedLayout(LENGTHS), weights)
        hidden.square().sum().backward()
        results.append([hidden.detach(), *(p.grad for p in ours.model.parameters())])
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-9)


def test_only_plain_matrices_are_cast_once() -> None:
    assert Llama.from_transformers(transformers_llama()).castable
    assert not Llama.from_transformers(transformers_llama(mlp_bias=True)).castable
    adapted = Llama.from_transformers(transformers_llama())
    adapted.model.layers[1].mlp.up_proj = torch.nn.Linear(48, 64, bias=False)
    assert not adapted.castable


@torch.no_grad()
def test_token_by_token_with_a_cache_is_the_same() -> None:
    ours = Llama.from_transformers(transformers_llama()).eval()
    ids, positions = packed(LENGTHS)
    embeddings = ours.model.embed_tokens(ids)
    expected = ours(embeddings, positions, PackedLayout(LENGTHS)).split(LENGTHS)
    cache = PackedCache(LENGTHS)
    for time in range(max(LENGTHS)):
        rows = [row for row, length in enumerate(LENGTHS) if time < length]
        index = torch.tensor([sum(LENGTHS[:row]) + time for row in rows])
        layout = PackedLayout([1] * len(rows), cache, rows)
        hidden = ours(embeddings[index], positions[index], layout)
        cache.advance(layout)
        torch.testing.assert_close(hidden, torch.stack([expected[row][time] for row in rows]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "gelu"}, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}], ids=str
)
def test_what_it_does_not_compute_is_refused(changes: dict[str, Any], tmp_path) -> None:
    theirs = transformers_llama(**changes)
    with pytest.raises(ValueError, match="only Llama with SiLU"):
        Llama.from_transformers(theirs)
    theirs.save_pretrained(tmp_path)
    settings = tiny_settings().model_copy(update={"llm": LLMSettings(checkpoint=str(tmp_path))})
    with pytest.raises(UserError, match="only Llama with SiLU"):
        build_model(settings, vocab_size=VOCAB)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed kernel for this device: what it gets is right, what it computes does not matter."""

    def flash_attention(query, key, value, starts, _starts, longest, _longest, **_options):
        return query + (key + value).mean(1, keepdim=True) * starts[-1] / longest

    monkeypatch.setattr(attention, "flash_attention", flash_attention)
    monkeypatch.setattr(llama, "has_packed_kernel", lambda *_: True)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("bf16", [False, True])
def test_the_first_layer_and_all_others_are_one_graph_each_for_all_lengths(bf16: bool) -> None:
    """With the packed kernel, forward and backward; another number of samples or tokens compiles nothing again."""
    torch.compiler.reset()
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        compiled.append(graph.print_readable(print_output=False))
        return graph.forward

    ours = Llama.from_transformers(transformers_llama())
    plain = Llama.from_transformers(transformers_llama())
    for layer in ours.model.layers:
        layer.compile(dynamic=True, fullgraph=True, backend=backend)
    for lengths in (LENGTHS, [4, 6], [7, 2, 8, 2, 2, 3]):
        ids, positions = packed(lengths)
        results = []
        for model in (ours, plain):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                hidden = model(model.model.embed_tokens(ids), positions, PackedLayout(lengths))
            hidden.sum().backward()
            results.append(hidden)
        torch.testing.assert_close(*results)
    assert len(compiled) == 2
