"""The model elsewhere than in torch's fp32, at DINOv2-small + SmolLM2-135M with random weights: onnxruntime, and 8-bit weights.

Speed is a ratio of times taken in turn in one process; size is a ratio of bytes; the difference is the norm of the logits' difference over
the norm of torch's. ONNX runs the coarse mode over a clip and a question; 8-bit weights read the same, then go on token by token.
Needs the extra `onnx`.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
import torch

from benchmarks.report import Measurement, arguments, show, side_by_side
from benchmarks.shapes import VOCABULARY, model_settings, video_question
from fvlm_core.data.batch import PackedBatch
from fvlm_core.model.build import build_model
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.inference import generate, logits
from fvlm_core.release.int8 import int8_weights, weight_bytes
from fvlm_core.release.onnx_export import COARSE_FILE, READ_FILE, export_onnx

NEW_TOKENS = 17
TORCH = "torch, fp32"


def main() -> None:
    options = arguments(__doc__ or "", rounds={"type": int, "default": 3}, frames={"type": int, "default": 8})
    show(measure(options.frames, options.rounds), as_json=options.json)


def measure(frames: int, rounds: int) -> Iterator[Measurement]:
    """Both, over a clip of `frames` frames."""
    model = build_model(model_settings(), vocab_size=VOCABULARY).eval().requires_grad_(False)
    batch = video_question(frames)
    wanted = logits(model, batch, "coarse_only")
    yield from _int8(model, batch, wanted, rounds)
    with TemporaryDirectory(prefix="fvlm-onnx-") as folder:
        yield from _onnx(model, batch, wanted, rounds, Path(folder))


def _onnx(model: FoveatedVLM, batch: PackedBatch, wanted: torch.Tensor, rounds: int, folder: Path) -> Iterator[Measurement]:
    export_onnx(model, folder)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    coarse = onnxruntime.InferenceSession(folder / COARSE_FILE, settings)
    read = onnxruntime.InferenceSession(folder / READ_FILE, settings)
    inputs = {"frames": batch.frames, "input_ids": batch.input_ids, "visual_positions": batch.visual_positions.flatten()}
    fed = {name: tensor.numpy() for name, tensor in inputs.items()}
    asked = {"frames": fed["frames"], "queries": model.connector.q_static.expand(len(batch.frames), -1, -1).numpy()}
    features = model.encode(batch.frames)
    tokens = model.read(features, torch.from_numpy(asked["queries"])).tokens
    for name, found, reference in (
        ("coarse", coarse.run(None, fed)[0], wanted),
        ("read", read.run(None, asked)[0], tokens),
    ):
        yield Measurement("export", f"onnx_{name}_difference", _difference(np.asarray(found), reference.numpy()), "x", TORCH)
    seconds = side_by_side(
        {
            "torch": lambda: logits(model, batch, "coarse_only"),
            "onnx": lambda: coarse.run(None, fed),
            "torch_read": lambda: model.read(model.encode(batch.frames), torch.from_numpy(asked["queries"])),
            "onnx_read": lambda: read.run(None, asked),
        },
        rounds=rounds,
    )
    yield Measurement("export", "onnx_coarse_seconds", seconds["onnx"], "s", TORCH, seconds["onnx"] / seconds["torch"])
    yield Measurement("export", "onnx_read_seconds", seconds["onnx_read"], "s", TORCH, seconds["onnx_read"] / seconds["torch_read"])
    megabytes = (folder / COARSE_FILE).stat().st_size / 1e6
    yield Measurement("export", "onnx_coarse_mb", megabytes, "MB", "weights in fp32", megabytes * 1e6 / weight_bytes(model))


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
