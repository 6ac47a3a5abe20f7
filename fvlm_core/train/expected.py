"""Estimate the samples and FLOPs of a run before it starts. Does not import torch.

The estimate uses the recipe and the shards' index or, before there are shards, the mean samples assumed by the profile.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from fvlm_core.config import LLMSettings, Recipe, VisionSettings
from fvlm_core.data.jobs import INDEX_FILE, ShardManifest
from fvlm_core.data.mixture import sample_shares
from fvlm_core.model.flops import Backbone, ModelDims, SampleShape, sample_flops, samples_for
from fvlm_core.model.published import PUBLISHED
from fvlm_core.settings import Settings

COLUMNS = ["split", "source", "kind", "n_frames", "n_tokens", "n_answer_tokens"]


class MeanSample(Settings):
    """The mean sample of a source."""

    frames: float = 0.0
    """Number of distinct frames: 1 for an image, 0 for text."""
    image: bool = False
    """Whether it is an image, which is shown `data.image_repeats` times."""
    tokens: float
    """Number of text tokens."""
    answer_tokens: float
    """Number of text tokens in answers, which are the labelled ones if the loss is on answers only."""


@dataclass(frozen=True)
class ExpectedCost:
    """Expected samples and FLOPs of a complete run; None if not known yet."""

    samples: int | None
    flops: float | None


def expected_cost(
    recipe: Recipe, shards: Path | None, assumed: Mapping[str, MeanSample] | None = None, *, vocab_size: int | None = None
) -> ExpectedCost:
    """Estimate the cost of the recipe on the shards in a folder or, if `shards` is None, on `assumed` mean samples by source.

    `vocab_size`: vocabulary of a language model that is built from a shape, needed without shards. FLOPs are computed from the mean sample
    of each source and deviate a few percent from the run's own count; for a recipe with a FLOP budget they are exact.
    """
    run = recipe.run
    per_sample = _per_sample(recipe, shards, assumed or {}, vocab_size) if shards or assumed else None
    if run.steps is not None:
        samples = run.steps * run.batch_samples
        return ExpectedCost(samples, None if per_sample is None else samples * per_sample)
    assert run.budget_flops is not None
    steps = None if per_sample is None else max(1, round(samples_for(run.budget_flops, per_sample) / run.batch_samples))
    return ExpectedCost(None if steps is None else steps * run.batch_samples, run.budget_flops)


def _per_sample(recipe: Recipe, shards: Path | None, assumed: Mapping[str, MeanSample], vocab_size: int | None) -> float | None:
    vision, llm = _vision_config(recipe.model.vision), _llm_config(recipe.model.llm)
    if vision is None or llm is None:
        return None
    vocab = llm.get("vocab_size") or (ShardManifest.read(shards).vocab_size if shards else vocab_size)
    if vocab is None:
        return None
    dims = ModelDims.from_configs(vision, llm | {"vocab_size": vocab}, recipe.model.vision.frame_px)
    backbones: tuple[Backbone, ...] = ("vision", "llm")
    frozen: list[Backbone] = [backbone for backbone in backbones if not recipe.optimizer.peaks[backbone]]
    costs, lengths = [], []
    parts = [part for part in recipe.data.mixture if part.share]
    for part in parts:
        mean = _mean_in(shards, part.source) if shards else assumed.get(part.source)
        if mean is None:
            return None
        shown = mean.frames * (recipe.data.image_repeats if mean.image else 1)
        labels = mean.tokens if recipe.data.loss_on == "all_text" else mean.answer_tokens
        length = mean.tokens + shown * recipe.model.tokens_per_frame
        shape = SampleShape(round(mean.frames), round(shown), round(mean.tokens), round(labels), round(length - mean.answer_tokens))
        cost = sample_flops(recipe.model, dims, shape, recipe.loss, frozen=frozen).train
        if recipe.dpo is not None:  # the second answer of a pair; its frames are encoded only once
            cost += sample_flops(recipe.model, dims, replace(shape, frames=0), recipe.loss, frozen=frozen).train
        costs.append(cost)
        lengths.append(length)
    shares = [part.share for part in parts]
    if recipe.data.shares_of == "tokens":
        shares = sample_shares(shares, lengths)
    return sum(share * cost for share, cost in zip(shares, costs, strict=True))


def _mean_in(shards: Path, source: str) -> MeanSample | None:
    """Return the mean training sample of a source in the shards, or None without samples."""
    rows = pq.read_table(shards / INDEX_FILE, columns=COLUMNS, filters=[("split", "=", "train"), ("source", "=", source)])
    if not rows.num_rows:
        return None
    frames, tokens, answers = (float(np.mean(rows[name])) for name in ("n_frames", "n_tokens", "n_answer_tokens"))
    return MeanSample(frames=frames, image=rows["kind"][0].as_py() == "image", tokens=tokens, answer_tokens=answers)


def _vision_config(vision: VisionSettings) -> dict[str, Any] | None:
    shape = vision.shape
    if shape is None:
        return _read_config(vision.checkpoint)
    sizes = {"hidden_size": shape.width, "num_hidden_layers": shape.layers, "patch_size": shape.patch_px}
    return sizes | {"mlp_ratio": 4}  # DINOv2's, and transformers' default


def _llm_config(llm: LLMSettings) -> dict[str, Any] | None:
    shape = llm.shape
    if shape is None:
        config = _read_config(llm.checkpoint)
        return config if config is None or llm.layers is None else config | {"num_hidden_layers": llm.layers}
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
    return heads | {"hidden_size": shape.width, "intermediate_size": shape.mlp_width, "num_hidden_layers": shape.layers}


def llm_width(llm: LLMSettings) -> int | None:
    """Return the hidden size of a language model, or None if its configuration is not available locally."""
    config = _llm_config(llm)
    return None if config is None else config["hidden_size"]


def patches_per_side(vision: VisionSettings) -> int | None:
    """Return the number of patches per frame side.

    None if the encoder's configuration is not available locally, or if the frame's side is not a multiple of the patch size.
    """
    config = _vision_config(vision)
    return None if config is None or vision.frame_px % config["patch_size"] else vision.frame_px // config["patch_size"]


def _read_config(checkpoint: str | None) -> dict[str, Any] | None:
    """Read a checkpoint's configuration from its folder, the local hub cache or `PUBLISHED`; None if it is in none of them."""
    if checkpoint is None:
        return None
    path = Path(checkpoint) / "config.json"
    on_hub = "/" in checkpoint and not Path(checkpoint).is_absolute()
    try:
        cached = try_to_load_from_cache(checkpoint, "config.json") if on_hub and not path.is_file() else None
    except HFValidationError:  # not a valid hub name; loading the model reports that
        cached = None
    found = path if path.is_file() else Path(cached) if isinstance(cached, str) else None
    return json.loads(found.read_text()) if found else PUBLISHED.get(checkpoint)
