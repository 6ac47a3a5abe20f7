"""What a run will cost before it starts: samples and FLOPs, from its recipe and the index of its shards, or from the mean samples that a
profile assumes as long as there are no shards. No torch here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from huggingface_hub import try_to_load_from_cache

from fvlm_core.config import LLMSettings, Recipe, VisionSettings
from fvlm_core.data.jobs import INDEX_FILE, ShardManifest
from fvlm_core.data.mixture import sample_shares
from fvlm_core.model.flops import Backbone, ModelDims, SampleShape, sample_flops, samples_for
from fvlm_core.model.published import PUBLISHED
from fvlm_core.settings import Settings

COLUMNS = ["split", "source", "kind", "n_frames", "n_tokens", "n_answer_tokens"]


class MeanSample(Settings):
    """A mean sample of a source."""

    frames: float = 0.0
    """Distinct ones: 1 for an image, 0 for text."""
    image: bool = False
    """Shown several times (`data.image_repeats`)."""
    tokens: float
    """Text tokens."""
    answer_tokens: float
    """Of these, those that are labelled where the loss is on answers."""


@dataclass(frozen=True)
class ExpectedCost:
    """Of a whole run; None where it cannot be known yet."""

    samples: int | None
    flops: float | None


def expected_cost(recipe: Recipe, shards: Path | None, assumed: Mapping[str, MeanSample] | None = None) -> ExpectedCost:
    """What the recipe will cost on the shards in a folder (None: they are not made yet; then on `assumed` samples, by source).

    FLOPs are of mean samples of each source, so a few percent off the run's own count; of a recipe with a budget they are exact.
    """
    run = recipe.run
    per_sample = _per_sample(recipe, shards, assumed or {}) if shards or assumed else None
    if run.steps is not None:
        samples = run.steps * run.batch_samples
        return ExpectedCost(samples, None if per_sample is None else samples * per_sample)
    assert run.budget_flops is not None
    steps = None if per_sample is None else max(1, round(samples_for(run.budget_flops, per_sample) / run.batch_samples))
    return ExpectedCost(None if steps is None else steps * run.batch_samples, run.budget_flops)


def _per_sample(recipe: Recipe, shards: Path | None, assumed: Mapping[str, MeanSample]) -> float | None:
    vision, llm = _vision_config(recipe.model.vision), _llm_config(recipe.model.llm)
    if vision is None or llm is None:
        return None
    vocab = llm.get("vocab_size") or (ShardManifest.read(shards).vocab_size if shards else None)
    if vocab is None:
        return None
    dims = ModelDims.from_configs(vision, llm | {"vocab_size": vocab}, recipe.model.vision.frame_px)
    rates: dict[Backbone, float] = {"vision": recipe.optimizer.lr_vision, "llm": recipe.optimizer.lr_llm}
    frozen: list[Backbone] = [backbone for backbone, rate in rates.items() if not rate]
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
        costs.append(sample_flops(recipe.model, dims, shape, recipe.loss, frozen=frozen).train)
        lengths.append(length)
    shares = [part.share for part in parts]
    if recipe.data.shares_of == "tokens":
        shares = sample_shares(shares, lengths)
    return sum(share * cost for share, cost in zip(shares, costs, strict=True))


def _mean_in(shards: Path, source: str) -> MeanSample | None:
    """The mean of a source's training samples in the shards."""
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
        return _read_config(llm.checkpoint)
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
    return heads | {"hidden_size": shape.width, "intermediate_size": shape.mlp_width, "num_hidden_layers": shape.layers}


def _read_config(checkpoint: str | None) -> dict[str, Any] | None:
    """A checkpoint's configuration from its folder or the hub's cache on this machine, else a published one; None where it is unknown."""
    if checkpoint is None:
        return None
    path = Path(checkpoint) / "config.json"
    cached = None if path.is_file() else try_to_load_from_cache(checkpoint, "config.json") if "/" in checkpoint else None
    found = path if path.is_file() else Path(cached) if isinstance(cached, str) else None
    return json.loads(found.read_text()) if found else PUBLISHED.get(checkpoint)
