"""The training step at DINOv2-small + SmolLM2-135M: FLOPs, peak memory, and speed relative to a matrix product.

Floor: the minimum FLOPs for the loss, 1,560.5 G for the video batch and 931 G for the image batch, and the speed of `torch.mm` on the same
threads.
"""

import subprocess
import sys
from collections.abc import Iterator

import torch

from benchmarks.report import Measurement, arguments, peak_memory_gb, show, side_by_side
from benchmarks.shapes import VOCABULARY, image_batch, model_settings, train_batch
from fvlm_core.config import LossSettings
from fvlm_core.data.batch import PackedBatch
from fvlm_core.model.build import build_model
from fvlm_core.model.flop_counter import count_flops
from fvlm_core.model.foveated import FoveatedVLM

LOSS = LossSettings(coarse=0.0, fine=[1.0])
ORIGINAL_GFLOP = {"train_step_gflop": 2243.9, "image_batch_gflop": 3346.0}
ORIGINAL_PEAK_GB = 6.65
MATMUL = 2048
"""Side of the square matrices of the reference product."""


def main() -> None:
    options = arguments(__doc__ or "", rounds={"type": int, "default": 3}, peak={"choices": ["plain", "checkpointed"]})
    if options.peak:
        print(_peak_gb(checkpointed=options.peak == "checkpointed"))
        return
    show(measure(options.rounds, options.threads), as_json=options.json)


def measure(rounds: int, threads: int) -> Iterator[Measurement]:
    """Measure FLOPs of both batches, then speed and memory of the video batch."""
    model = build_model(model_settings(), vocab_size=VOCABULARY).train()
    video, images = train_batch(), image_batch()
    gflop = {}
    for name, batch in (("train_step_gflop", video), ("image_batch_gflop", images)):
        gflop[name] = count_flops(lambda batch=batch: _backward(model, batch)) / 1e9
        ratio = gflop[name] / ORIGINAL_GFLOP[name]
        yield Measurement("train_step", name, gflop[name], "GFLOP", "the original implementation", ratio)
    left, right = torch.randn(MATMUL, MATMUL), torch.randn(MATMUL, MATMUL)
    seconds = side_by_side({"step": lambda: _backward(model, video), "matmul": lambda: left @ right}, rounds=rounds)
    speed, plain = gflop["train_step_gflop"] / seconds["step"], 2 * MATMUL**3 / 1e9 / seconds["matmul"]
    yield Measurement("train_step", "train_step_vs_matmul", speed, "GFLOP/s", "torch.mm", speed / plain)
    for name, kind in (("train_step_peak_gb", "plain"), ("train_step_peak_checkpointed_gb", "checkpointed")):
        command = [sys.executable, "-m", "benchmarks.train_step", "--peak", kind, "--threads", str(threads)]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        yield Measurement("train_step", name, peak, "GB", "the original implementation", peak / ORIGINAL_PEAK_GB)


def _backward(model: FoveatedVLM, batch: PackedBatch) -> None:
    model.zero_grad()
    (model(batch, LOSS).objective / batch.n_labels).backward()


def _peak_gb(*, checkpointed: bool) -> float:
    """Return the peak memory of a complete first step above the loaded model: gradients, AdamW state, activations."""
    model = build_model(model_settings(), vocab_size=VOCABULARY).train()
    model.set_gradient_checkpointing(checkpointed)
    batch = train_batch()

    def step() -> None:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        _backward(model, batch)
        optimizer.step()

    return peak_memory_gb(step)


if __name__ == "__main__":
    main()
