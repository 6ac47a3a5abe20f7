"""Settings of the real model shapes (with random weights), and the batches that benchmarks share."""

import numpy as np

from fvlm_core.config import LLMSettings, LLMShape, ModelSettings, VisionSettings, VisionShape
from fvlm_core.data.batch import ChatFormat, PackedBatch, Sample, Turn, pack

VOCABULARY = 49_152
FRAME_PX = 224
DINOV2_SMALL = VisionShape(width=384, layers=12, heads=6)
SMOLLM2 = {
    "135M": LLMShape(width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536),
    "360M": LLMShape(width=960, layers=32, heads=15, kv_heads=5, mlp_width=2560),
    "1.7B": LLMShape(width=2048, layers=24, heads=32, kv_heads=32, mlp_width=8192, rope_theta=130_000.0),
}
NO_TEMPLATE = ChatFormat(system=[], user_open=[], user_close=[], assistant_open=[], assistant_close=[2])
"""No chat template, like the original, so that token counts are equal."""


def model_settings(size: str = "135M", **changes) -> ModelSettings:
    """Return the settings of DINOv2-small + SmolLM2 of a size, with one fine iteration like the original."""
    vision = VisionSettings(shape=DINOV2_SMALL, frame_px=FRAME_PX)
    return ModelSettings.model_validate({"vision": vision, "llm": LLMSettings(shape=SMOLLM2[size]), "fine_iterations": 1} | changes)


def text_sample(rng: np.random.Generator, *, frames: int, shown: list[int], text: int, labels: int, frame_px: int = FRAME_PX) -> Sample:
    """Return a video-first sample with `text` text tokens, the last `labels` of which are targets (including the end marker)."""
    ids = rng.integers(10, VOCABULARY, text).tolist()
    pixels = rng.integers(0, 256, (frames, frame_px, frame_px, 3), dtype=np.uint8)
    turn = Turn(ids[: text - labels], ids[text - labels : text - 1])
    return Sample("benchmark", "benchmark", pixels, [shown], [turn])


def train_batch() -> PackedBatch:
    """Pack four videos of 4, 8, 8, 16 frames with 24, 48, 96, 200 text tokens; the second half of each text is labelled."""
    rng = np.random.default_rng(0)
    sizes = zip((4, 8, 8, 16), (24, 48, 96, 200), strict=True)
    return pack([text_sample(rng, frames=f, shown=list(range(f)), text=t, labels=t // 2) for f, t in sizes], NO_TEMPLATE)


def image_batch() -> PackedBatch:
    """Pack eight images, each repeated as 8 frames, with 100 text tokens, 50 of them labelled."""
    rng = np.random.default_rng(0)
    return pack([text_sample(rng, frames=1, shown=[0] * 8, text=100, labels=50) for _ in range(8)], NO_TEMPLATE)


def video_question(frames: int, tokens: int = 32, *, frame_px: int = FRAME_PX) -> PackedBatch:
    """Pack one video and a question after it."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (frames, frame_px, frame_px, 3), dtype=np.uint8)
    question = Turn(rng.integers(10, VOCABULARY, tokens).tolist(), [])
    return pack([Sample("benchmark", "benchmark", pixels, [list(range(frames))], [question])], NO_TEMPLATE)
