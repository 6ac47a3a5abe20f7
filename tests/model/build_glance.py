"""Tiny models with a glance, and batches for them."""

import numpy as np
import torch
from hypothesis import strategies as st

from fvlm_core.config import GlanceSettings, ModelSettings
from fvlm_core.data.batch import Sample, pack
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.glance import GlanceFeatures, encode_glance, with_all_patches
from tests.model.build import CHAT, built, mixed, tiny_settings

GLANCE_PX, ALL = 42, 9
DEEPEST = [{"zoom": 2, "levels": 1}, {"zoom": 3, "levels": 1}, {"zoom": 2, "levels": 2}, {"zoom": [3, 2], "levels": 2}]
"""Frames of 84, 126, 168 and 252 px over a glance of 3 x 3 patches."""
ZOOMS = st.lists(st.integers(2, 4), min_size=1, max_size=3).filter(lambda zooms: np.prod(zooms) <= 12)


def glance_settings(**changes) -> ModelSettings:
    """A tiny model's settings; `k` is its tokens per frame."""
    k = changes.pop("k", 1)
    glance = GlanceSettings(**({"px": GLANCE_PX, "zoom": 2, "open": 2} | changes))
    small = tiny_settings(tokens_per_frame=k)
    vision = small.vision.model_copy(update={"frame_px": GLANCE_PX * glance.shrink})
    return ModelSettings.model_validate(small.model_dump() | {"vision": vision.model_dump(), "glance": glance.model_dump()})


def glance_model(**changes) -> FoveatedVLM:
    return built(glance_settings(**changes))


def large(samples: list[Sample], model: FoveatedVLM) -> list[Sample]:
    """The samples with random frames of the model's size."""
    side, rng = model.settings.vision.frame_px, np.random.default_rng(5)
    return [
        Sample(s.key, s.source, rng.integers(0, 256, (len(s.frames), side, side, 3), dtype=np.uint8), s.media, s.turns, s.question_first,
               s.label_questions)
        for s in samples
    ]  # fmt: skip


def packed(model: FoveatedVLM, samples: list[Sample] | None = None):
    """A batch with everything in it."""
    given = mixed(np.random.default_rng(1)) if samples is None else samples
    return pack(large(given, model), CHAT, tokens_per_frame=model.settings.tokens_per_frame)


def frames_of(model: FoveatedVLM, n: int) -> torch.Tensor:
    side = model.settings.vision.frame_px
    return torch.from_numpy(np.random.default_rng(8).integers(0, 256, (n, side, side, 3), dtype=np.uint8))


def everything(model: FoveatedVLM, frames: torch.Tensor) -> GlanceFeatures:
    assert model.settings.glance is not None
    small = encode_glance(model.encoder, frames, model.settings.glance)
    return with_all_patches(model.encoder, small, model.settings.glance, model.connector.scale_embeddings)
