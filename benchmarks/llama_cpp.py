"""Run llama.cpp on embeddings through the C interface of the library in the wheel `xllamacpp`. The tests use it too.

All parameters are the library's defaults (a context of 512 tokens, KV cache in fp16), so that none of their many fields is declared here.
"""

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_void_p
from importlib.util import find_spec
from pathlib import Path

import numpy as np


class Params(ctypes.Structure):
    """An opaque structure, large enough for any of the library's parameter structures, which are passed by value as last arguments."""

    _fields_ = [("words", c_int64 * 128)]


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


SIGNATURES = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (Params, []),
    "llama_context_default_params": (Params, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, Params]),
    "llama_init_from_model": (c_void_p, [c_void_p, Params]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_set_embeddings": (None, [c_void_p, c_bool]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_embeddings_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_n_embd": (c_int32, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_free": (None, [c_void_p]),
    "llama_model_free": (None, [c_void_p]),
}


def library() -> ctypes.CDLL:
    """Load the library and declare the signatures of its functions."""
    spec = find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("xllamacpp*.so")
    found = ctypes.CDLL(str(path))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.llama_backend_init()
    return found


class LlamaCpp:
    """A GGUF model and the state of one sequence."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.lib = library()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        assert self.model, f"llama.cpp does not load {path}"
        self.context = self.lib.llama_init_from_model(self.model, self.lib.llama_context_default_params())
        assert self.context
        self.lib.llama_set_n_threads(self.context, threads, threads)
        self.lib.llama_set_embeddings(self.context, True)
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.width, self.tokens = self.lib.llama_model_n_embd(self.model), self.lib.llama_vocab_n_tokens(self.vocab)
        self.read = 0

    def run(self, embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Append embeddings [n, width]; return their last hidden states [n, width] and logits [n, vocabulary]."""
        n = len(embeddings)
        batch = self.lib.llama_batch_init(n, self.width, 1)
        try:
            batch.n_tokens = n
            np.ctypeslib.as_array(batch.embd, (n, self.width))[:] = embeddings
            for place in range(n):
                batch.pos[place] = self.read + place
                batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
            assert self.lib.llama_decode(self.context, batch) == 0
            hidden = [np.ctypeslib.as_array(self.lib.llama_get_embeddings_ith(self.context, i), (self.width,)).copy() for i in range(n)]
            logits = [np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), (self.tokens,)).copy() for i in range(n)]
        finally:
            self.lib.llama_batch_free(batch)
        self.read += n
        return np.stack(hidden), np.stack(logits)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Return the token ids of a text; `special` parses control tokens."""
        raw = text.encode()
        found = (c_int32 * (len(raw) + 8))()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), found, len(found), False, special)
        return list(found[:count])

    def forget(self) -> None:
        """Clear the sequence."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.read = 0

    def close(self) -> None:
        """Free model and context."""
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)
