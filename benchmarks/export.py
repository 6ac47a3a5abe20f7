"""Exported models against torch in fp32: onnxruntime, llama.cpp and int8 weights, at DINOv2-small + SmolLM2-135M with random weights.

Speed is the ratio of times measured in turn in one process. Size is a ratio of bytes. Difference is the norm of the logits' difference over
the norm of torch's logits.

onnxruntime runs the coarse and the fine mode over a clip and a question. llama.cpp runs the language model over the same tokens, then over
one more. The int8 model reads the same input, then generates token by token. Needs the development environment.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import numpy as np
import onnxruntime
import torch

from benchmarks.llama_cpp import LlamaCpp
from benchmarks.report import Measurement, arguments, show, side_by_side
from benchmarks.shapes import VOCABULARY, model_settings, video_question
from fvlm_core.data.batch import PackedBatch
from fvlm_core.data.tokenizer import train_tokenizer
from fvlm_core.model.attention import PackedCache, PackedLayout
from fvlm_core.model.build import build_model
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.inference import generate, logits, read_batch
from fvlm_core.model.names import SHORT_MODES
from fvlm_core.release.gguf_export import Precision, export_gguf
from fvlm_core.release.int8 import int8_weights, weight_bytes
from fvlm_core.release.onnx_export import COARSE_FILE, FINE_FILE, READ_FILE, export_onnx

NEW_TOKENS = 17
TORCH = "torch, fp32"


def main() -> None:
    options = arguments(__doc__ or "", rounds={"type": int, "default": 3}, frames={"type": int, "default": 8})
    show(measure(options.frames, options.rounds), as_json=options.json)


def measure(frames: int, rounds: int) -> Iterator[Measurement]:
    """Measure every export on a clip of `frames` frames."""
    model = build_model(model_settings(), vocab_size=VOCABULARY).eval().requires_grad_(False)
    batch = video_question(frames)
    wanted = logits(model, batch, "coarse_only")
    yield from _int8(model, batch, wanted, rounds)
    with TemporaryDirectory(prefix="fvlm-export-") as folder:
        for precision in get_args(Precision):
            yield from _llama_cpp(model, batch, wanted, rounds, Path(folder) / "model.gguf", precision)
        yield from _onnx(model, batch, rounds, Path(folder))


def _llama_cpp(
    model: FoveatedVLM, batch: PackedBatch, wanted: torch.Tensor, rounds: int, path: Path, precision: Precision
) -> Iterator[Measurement]:
    export_gguf(model.llm, train_tokenizer(["what happens in the video"], 300), path, precision=precision)
    tokens = read_batch(model, batch, "coarse_only").tokens
    embedded = model.embed(batch.input_ids).index_copy(0, batch.visual_positions.flatten(), tokens.flatten(0, 1))
    theirs, length = LlamaCpp(path, torch.get_num_threads()), len(embedded)
    name = f"llama_cpp_{precision}"
    yield Measurement("export", f"{name}_difference", _difference(theirs.run(embedded.numpy())[1], wanted.numpy()), "x", TORCH)
    megabytes = path.stat().st_size / 1e6
    yield Measurement("export", f"{name}_mb", megabytes, "MB", "the language model in fp32", megabytes * 1e6 / weight_bytes(model.llm))
    cache = PackedCache([length + 1])

    @torch.no_grad()
    def ours(rows: torch.Tensor, known: int) -> None:
        cache.lengths[0] = known
        positions = torch.arange(known, known + len(rows))
        model.llm.lm_head(model.run_llm(rows, positions, PackedLayout([len(rows)], cache)))

    def read_anew() -> None:
        theirs.forget()
        theirs.run(embedded.numpy())

    def one_more() -> None:
        theirs.run(embedded[:1].numpy())

    seconds = side_by_side(
        {
            "torch": lambda: ours(embedded, 0),
            "torch, token": lambda: ours(embedded[:1], length),
            "theirs": read_anew,
            "theirs, token": one_more,
        },
        rounds=rounds,
    )
    theirs.close()
    for metric, ending in (("read_seconds", ""), ("token_seconds", ", token")):
        ratio = seconds[f"theirs{ending}"] / seconds[f"torch{ending}"]
        yield Measurement("export", f"{name}_{metric}", seconds[f"theirs{ending}"], "s", TORCH, ratio)


def _onnx(model: FoveatedVLM, batch: PackedBatch, rounds: int, folder: Path) -> Iterator[Measurement]:
    export_onnx(model, folder)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    tensors = {"frames": batch.frames, "input_ids": batch.input_ids, "visual_positions": batch.visual_positions.flatten()}
    fed = {name: tensor.numpy() for name, tensor in tensors.items()}
    queries = model.connector.q_static.expand(len(batch.frames), -1, -1)
    read = onnxruntime.InferenceSession(folder / READ_FILE, settings)

    def ours() -> torch.Tensor:
        return model.read(model.encode(batch.frames), queries).tokens

    def theirs() -> np.ndarray:
        return np.asarray(read.run(None, {"frames": fed["frames"], "queries": queries.numpy()})[0])

    yield from _compared("read", ours, theirs, rounds)
    for short, file in (("coarse", COARSE_FILE), ("fine", FINE_FILE)):
        session = onnxruntime.InferenceSession(folder / file, settings)
        inputs = fed | ({"query_sources": batch.query_sources.numpy()} if short == "fine" else {})
        mode = SHORT_MODES[short]
        yield from _compared(
            short,
            lambda mode=mode: logits(model, batch, mode),
            lambda session=session, inputs=inputs: np.asarray(session.run(None, inputs)[0]),
            rounds,
        )
        megabytes = (folder / file).stat().st_size / 1e6
        yield Measurement("export", f"onnx_{short}_mb", megabytes, "MB", "weights in fp32", megabytes * 1e6 / weight_bytes(model))


def _compared(name: str, ours: Callable[[], torch.Tensor], theirs: Callable[[], np.ndarray], rounds: int) -> Iterator[Measurement]:
    yield Measurement("export", f"onnx_{name}_difference", _difference(theirs(), ours().numpy()), "x", TORCH)
    seconds = side_by_side({"torch": ours, "onnx": theirs}, rounds=rounds)
    yield Measurement("export", f"onnx_{name}_seconds", seconds["onnx"], "s", TORCH, seconds["onnx"] / seconds["torch"])


def _int8(model: FoveatedVLM, batch: PackedBatch, wanted: torch.Tensor, rounds: int) -> Iterator[Measurement]:
    small = int8_weights(model)
    yield Measurement("export", "int8_difference", _difference(logits(small, batch, "coarse_only").numpy(), wanted.numpy()), "x", TORCH)
    megabytes = weight_bytes(small) / 1e6
    yield Measurement("export", "int8_mb", megabytes, "MB", "weights in fp32", megabytes * 1e6 / weight_bytes(model))
    seconds = side_by_side(
        {
            f"{name} {tokens}": lambda one=one, tokens=tokens: generate(one, batch, "coarse_only", max_new_tokens=tokens, stop_ids=[])
            for name, one in (("fp32", model), ("int8", small))
            for tokens in (1, NEW_TOKENS)
        },
        rounds=rounds,
    )
    first = {name: seconds[f"{name} 1"] for name in ("fp32", "int8")}
    token = {name: (seconds[f"{name} {NEW_TOKENS}"] - first[name]) / (NEW_TOKENS - 1) for name in first}
    yield Measurement("export", "int8_first_token_seconds", first["int8"], "s", TORCH, first["int8"] / first["fp32"])
    yield Measurement("export", "int8_token_seconds", token["int8"], "s", TORCH, token["int8"] / token["fp32"])


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


if __name__ == "__main__":
    main()
