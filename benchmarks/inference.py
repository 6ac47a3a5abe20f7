"""Inference at DINOv2-small + SmolLM2-135M: 64 frames and a question of 32 tokens, in two modes, against the bare encoder.

Floor: a plain `Dinov2Model` forward over the same frames, which any model that looks at them all has to pay.
"""

import torch
from transformers import Dinov2Model

from benchmarks.report import Measurement, arguments, show, side_by_side
from benchmarks.shapes import VOCABULARY, model_settings, video_question
from fvlm_core.model.flop_counter import count_flops
from fvlm_core.model.foveated import build_model
from fvlm_core.model.inference import read_batch

ORIGINAL_GFLOP = 942.2


def main() -> None:
    options = arguments(__doc__ or "", rounds={"type": int, "default": 3}, frames={"type": int, "default": 64})
    model = build_model(model_settings(), vocab_size=VOCABULARY).eval().requires_grad_(False)
    batch = video_question(options.frames)
    plain = Dinov2Model(model.encoder.config).eval()
    pixels = torch.randn(options.frames, 3, 224, 224)

    @torch.no_grad()
    def encode() -> None:
        plain(pixels)

    gflop = count_flops(lambda: read_batch(model, batch, "coarse_fine")) / 1e9
    seconds = side_by_side(
        {
            "encode": encode,
            "coarse_fine": lambda: read_batch(model, batch, "coarse_fine"),
            "autoregressive": lambda: read_batch(model, batch, "autoregressive"),
        },
        rounds=options.rounds,
    )
    measurements = [Measurement("inference", "coarse_fine_gflop", gflop, "GFLOP", "the original implementation", gflop / ORIGINAL_GFLOP)]
    for mode in ("coarse_fine", "autoregressive"):
        ratio = seconds[mode] / seconds["encode"]
        measurements.append(Measurement("inference", f"{mode}_vs_encode", ratio, "x", "Dinov2Model forward", ratio))
    show(measurements, as_json=options.json)


if __name__ == "__main__":
    main()
