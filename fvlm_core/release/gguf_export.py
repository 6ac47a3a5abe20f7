"""Export the language model and its tokenizer as one GGUF file, for llama.cpp.

llama.cpp runs the language model, with visual tokens as embeddings in its batches; its last hidden states (`llama_get_embeddings_ith`)
become the next queries. It has no encoder that can be queried: `read.onnx` and `queries.onnx` of `fvlm_core.release.onnx_export` provide
that part. llama.cpp's own converter writes the same file, but is a script in its repository and not in a package; this module needs only
`gguf`, a package by the same authors (the extra `gguf`). The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from fvlm_core.errors import UserError
from fvlm_core.model.llama import Llama

Precision = Literal["f32", "f16", "q8_0"]
PRE_TOKENIZERS = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}
"""llama.cpp's name for each supported sequence of pre-tokenizers, which split a text before BPE merges."""
BLOCK = 32
"""Weights that share a scale in q8_0; a matrix whose row length is not a multiple of this is stored as f16."""


def export_gguf(llama: Llama, tokenizer: PreTrainedTokenizerBase, path: Path, *, precision: Precision = "f16", name: str = "fVLM") -> None:
    """Write a language model and its tokenizer to `path`; norms and biases are always f32.

    Raises UserError if the extra is not installed, or llama.cpp does not support such a language model or tokenizer.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF cannot be written", where="gguf", fix='pip install "fvlm[gguf]"') from error
    config = llama.config
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"rotary positions of type {rope['rope_type']} are not exported", where="the language model", fix="use type default"
        )
    vocabulary = _vocabulary(tokenizer, config.vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.making")
    writer = gguf.GGUFWriter(temporary, "llama")
    writer.add_name(name)
    file_types = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_file_type(file_types[precision])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    writer.add_bos_token_id(vocabulary["bos"])
    writer.add_eos_token_id(vocabulary["eos"])
    writer.add_pad_token_id(vocabulary["pad"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(vocabulary["template"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for ours, weights in _weights(llama):
        theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise UserError(f"GGUF has no name for {ours}", where="the language model", fix="use a Llama such as SmolLM2")
        kind = gguf.GGMLQuantizationType[_kind(weights, precision)]
        writer.add_tensor(theirs, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(path)


def _kind(weights: np.ndarray, precision: Precision) -> str:
    """GGML's name of the type in which an array is stored."""
    if weights.ndim == 1 or precision == "f32":
        return "F32"
    return "Q8_0" if precision == "q8_0" and weights.shape[1] % BLOCK == 0 else "F16"


def _weights(llama: Llama):
    """Yield (name, fp32 array) of every parameter; a tied output layer is omitted, as the format requires."""
    config = llama.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads or config.num_attention_heads}
    for name, tensor in llama.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weights = tensor.detach().float().cpu().numpy()
        projection = name.split(".")[-2]
        yield name, _interleaved(weights, heads[projection]) if projection in heads else weights


def _interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection: RoPE rotates adjacent coordinates in llama.cpp, a head's two halves here."""
    halves = weights.reshape(heads, 2, -1, *weights.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weights.shape))


def _vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> dict:
    """Tokens, token types and merges of a byte-level BPE; embedding rows beyond the tokenizer's vocabulary are marked unused."""
    import gguf

    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    splitting = parts["pre_tokenizer"] or {}
    steps = tuple(step["type"] for step in splitting.get("pretokenizers", [splitting]) if "type" in step)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"].get("merges", ())]
    if parts["model"]["type"] != "BPE" or not merges or steps not in PRE_TOKENIZERS or parts["normalizer"] is not None:
        raise UserError(
            f"a tokenizer of {parts['model']['type']} with {len(merges)} merges after {', '.join(steps) or 'nothing'} is not exported",
            where="the tokenizer",
            fix="use a byte-level BPE such as SmolLM2's",
        )
    ids = tokenizer.get_vocab()
    if (largest := max(ids.values())) >= size:
        raise UserError(
            f"the tokenizer has ids up to {largest}, the model {size} tokens",
            where="the tokenizer",
            fix="use the one of its training",
        )
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, number in ids.items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for added in parts["added_tokens"]:
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    template = str(tokenizer.chat_template)
    return {"pre": PRE_TOKENIZERS[steps], "tokens": tokens, "types": types, "merges": merges, "template": template} | special
