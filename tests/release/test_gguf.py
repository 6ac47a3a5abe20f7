"""The language model as GGUF, read by llama.cpp, which runs it, and by transformers."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.llama_cpp import LlamaCpp
from fvlm_core.config import LLMSettings, LLMShape, ModelSettings, VisionSettings, VisionShape
from fvlm_core.data.batch import Sample, Turn, pack
from fvlm_core.data.tokenizer import chat_format, encode, train_tokenizer
from fvlm_core.errors import UserError
from fvlm_core.model.attention import PackedLayout
from fvlm_core.model.build import build_model
from fvlm_core.model.inference import logits, read_batch
from fvlm_core.model.llama import Llama
from fvlm_core.release.gguf_export import export_gguf

TEXTS = [
    "Which digits are in the first row? 3 5 7",
    "What's at 12:30? Two red cubes -- and it is RAINING.",
    "naïve café, 東京 №42\n\n  end ",
]
VOCABULARY = 420
"""More than the tokenizer has, as with padded embeddings."""
FP16_CACHE = 2e-3
"""How far the logits may be off: llama.cpp keeps keys and values in fp16."""


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 4, 400)


@pytest.fixture(scope="module")
def model():
    """Two query heads share a key head; the width is no multiple of what 8 bits need, the MLP's is."""
    llm = LLMSettings(shape=LLMShape(width=48, layers=3, heads=4, kv_heads=2, mlp_width=64, context=256))
    vision = VisionSettings(shape=VisionShape(width=32, layers=2, heads=2), frame_px=42)
    return build_model(ModelSettings(vision=vision, llm=llm), vocab_size=VOCABULARY, seed=3).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def file(model, tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    export_gguf(model.llm, tokenizer, path, precision="f32")
    return path


@pytest.fixture
def theirs(file):
    running = LlamaCpp(file)
    yield running
    running.close()


@pytest.fixture
def batch(tokenizer):
    frames = np.random.default_rng(0).integers(0, 256, (4, 42, 42, 3), dtype=np.uint8)
    question = Turn(encode(tokenizer, TEXTS[0]), [])
    return pack([Sample("k", "s", frames, [[0, 1, 2, 3]], [question], question_first=True)], chat_format(tokenizer))


def run(llama: Llama, embeddings: torch.Tensor) -> torch.Tensor:
    return llama.lm_head(llama(embeddings, torch.arange(len(embeddings)), PackedLayout([len(embeddings)])))


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_llama_cpp_computes_the_same_logits_of_tokens(model, theirs, tokenizer):
    embeddings = model.embed(torch.tensor(encode(tokenizer, TEXTS[1])))
    assert difference(theirs.run(embeddings.numpy())[1], run(model.llm, embeddings).numpy()) < FP16_CACHE


def test_the_coarse_mode_runs_in_llama_cpp(model, theirs, batch):
    """Visual tokens are embeddings in its batch."""
    tokens = read_batch(model, batch, "coarse_only").tokens
    embeddings = model.embed(batch.input_ids).index_copy(0, batch.visual_positions.flatten(), tokens.flatten(0, 1))
    assert difference(theirs.run(embeddings.numpy())[1], logits(model, batch, "coarse_only").numpy()) < FP16_CACHE


def test_the_autoregressive_mode_runs_in_llama_cpp(model, theirs, batch):
    """Its hidden states become the next query: frame after frame, over its own KV cache."""
    features, embeddings = model.encode(batch.frames), model.embed(batch.input_ids)
    found, done = [], 0
    for frame, ((place,), (source,)) in enumerate(zip(batch.visual_positions.tolist(), batch.query_sources.tolist(), strict=True)):
        hidden, scores = theirs.run(embeddings[done : source + 1].numpy())
        found.append(scores)
        query = model.connector.next_queries(torch.from_numpy(hidden[-1:])[None])
        embeddings[place] = model.read(features.select(torch.tensor([frame])), query).tokens[0, 0]
        done = source + 1
    found.append(theirs.run(embeddings[done:].numpy())[1])
    assert difference(np.concatenate(found), logits(model, batch, "autoregressive").numpy()) < FP16_CACHE


def test_llama_cpp_splits_texts_as_the_tokenizer_does(theirs, tokenizer):
    for text in [*TEXTS, "<|im_end|> is a marker", "x" * 40, "1234567890"]:
        assert theirs.tokenize(text, special=False) == encode(tokenizer, text)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": TEXTS[0]}], tokenize=False, add_generation_prompt=True)
    assert theirs.tokenize(chat, special=True) == tokenizer.encode(chat, add_special_tokens=False)


def test_transformers_reads_it_back(model, file, tokenizer):
    """To the bit, and the tokenizer too."""
    loaded = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ours = model.llm.to_transformers().state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in loaded.state_dict().items())
    again = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert again.encode(TEXTS[1], add_special_tokens=False) == encode(tokenizer, TEXTS[1])
    assert (again.bos_token, again.eos_token, again.chat_template) == (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template)


@pytest.mark.parametrize(("precision", "within", "smaller"), [("f16", 2e-3, 0.7), ("q8_0", 3e-2, 0.65)])
def test_fewer_bits_are_smaller_and_near(model, file, tokenizer, tmp_path, precision, within, smaller):
    path = tmp_path / "small.gguf"
    export_gguf(model.llm, tokenizer, path, precision=precision)
    assert path.stat().st_size < smaller * file.stat().st_size
    running, embeddings = LlamaCpp(path), model.embed(torch.tensor(encode(tokenizer, TEXTS[0])))
    found, wanted = running.run(embeddings.numpy())[1], run(model.llm, embeddings).numpy()
    running.close()
    assert 0 < difference(found, wanted) < within


def test_what_llama_cpp_cannot_run_is_refused(model, tokenizer, tmp_path):
    refused = tmp_path / "refused.gguf"
    with pytest.raises(UserError, match=f"ids up to {len(tokenizer) - 1}, the model 300 tokens"):
        export_gguf(build_model(model.settings, vocab_size=300).llm, tokenizer, refused)
    scaled = deepcopy(model.llm)
    scaled.config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UserError, match="of type linear are not exported"):
        export_gguf(scaled, tokenizer, refused)
    spaces = deepcopy(tokenizer)
    spaces.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match=r"of BPE with [0-9]+ merges after WhitespaceSplit is not exported"):
        export_gguf(model.llm, spaces, refused)
    assert not list(tmp_path.iterdir())
