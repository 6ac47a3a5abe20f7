"""fVLM-135M against SmolVLM2-256M and -500M (their shapes, random weights, transformers' own implementation), side by side.

Measures time to the first answer token, peak memory above the loaded model, and FLOPs, for one video and a question of 32 tokens.
SmolVLM2 reads a 512 px frame as 64 tokens; fVLM-135M reads a 224 px frame as one.
"""

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from transformers import Idefics3VisionConfig, LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

from benchmarks.report import Measurement, arguments, peak_memory_gb, show, side_by_side
from benchmarks.shapes import SMOLLM2, VOCABULARY, model_settings, video_question
from fvlm_core.model.build import build_model
from fvlm_core.model.flop_counter import count_flops
from fvlm_core.model.inference import read_batch

QUESTION = 32
VOCAB_SMOLVLM2 = 49_280
TOKENS_PER_FRAME = 64
FRAME_PX = 512
RIVALS = {"SmolVLM2-256M": SMOLLM2["135M"], "SmolVLM2-500M": SMOLLM2["360M"]}
"""Their language models have SmolLM2's shapes."""
OURS = "fVLM-135M"


def main() -> None:
    options = arguments(
        __doc__ or "",
        frames={"type": int, "nargs": "+", "default": [4, 16, 64]},
        rounds={"type": int, "default": 3},
        rival={"choices": [*RIVALS, "both"], "default": "SmolVLM2-256M"},
        peak_of={"help": "internal: print the peak memory of one model in this process"},
    )
    if options.peak_of:
        print(json.dumps(peak_memory_gb(first_token(options.peak_of, options.frames[0]))))
        return
    rivals = list(RIVALS) if options.rival == "both" else [options.rival]
    show(measure(rivals, options.frames, options.rounds, options.threads), as_json=options.json)


def measure(rivals: Sequence[str], frame_counts: Sequence[int], rounds: int, threads: int) -> Iterator[Measurement]:
    """Measure time, memory and FLOPs of each pair at each number of frames. The longest videos are timed once."""
    for rival, frames in product(rivals, frame_counts):
        runs = {OURS: first_token(OURS, frames), rival: first_token(rival, frames)}
        yield _compared("flops_ratio", "GFLOP", frames, {name: count_flops(run) / 1e9 for name, run in runs.items()})
        yield _compared("ttft_ratio", "s", frames, side_by_side(runs, rounds=rounds if frames < max(frame_counts) else 1))
        del runs
        gc.collect()
        yield _compared("peak_memory_ratio", "GB", frames, {name: _peak_gb(name, frames, threads) for name in (OURS, rival)})


def first_token(name: str, frames: int) -> Callable[[], object]:
    """Build the model `name`; return a function that computes the first token of its answer about a video."""
    if name == OURS:
        model = build_model(model_settings(), vocab_size=VOCABULARY).eval().requires_grad_(False)
        batch = video_question(frames, QUESTION)
        return lambda: model.llm.lm_head(read_batch(model, batch, "coarse_fine", room=1).hidden[-1:]).argmax(-1)
    shape = RIVALS[name]
    text_config = LlamaConfig(
        vocab_size=VOCAB_SMOLVLM2,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
    )
    config = SmolVLMConfig(
        text_config=text_config.to_dict(),
        vision_config=Idefics3VisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=FRAME_PX, patch_size=16
        ).to_dict(),
        scale_factor=4,
        image_token_id=VOCAB_SMOLVLM2 - 1,
    )
    model = SmolVLMForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)
    visual = torch.full((1, frames * TOKENS_PER_FRAME), VOCAB_SMOLVLM2 - 1)
    ids = torch.cat([visual, torch.randint(10, 1000, (1, QUESTION))], dim=1)
    pixels = torch.randn(1, frames, 3, FRAME_PX, FRAME_PX)
    return lambda: model(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1).logits.argmax(-1)


def _compared(metric: str, unit: str, frames: int, values: dict[str, float]) -> Measurement:
    """Compare our value with the rival's, which is second in `values`."""
    ours, (rival, theirs) = values[OURS], list(values.items())[1]
    return Measurement("smolvlm2", metric, ours, unit, f"{rival}, {frames} frames: {theirs:,.2f} {unit}", ours / theirs)


def _peak_gb(name: str, frames: int, threads: int) -> float:
    command = [sys.executable, "-m", "benchmarks.smolvlm2", "--peak-of", name, "--frames", str(frames), "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
