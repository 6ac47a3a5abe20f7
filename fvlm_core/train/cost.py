"""Training FLOPs of batches, and the number of steps that a FLOP budget allows."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
from torch import nn

from fvlm_core.config import DataSettings, LossSettings, ModelSettings, RunSettings
from fvlm_core.data.batch import PackedBatch, pack
from fvlm_core.data.plan import MixedSamples
from fvlm_core.data.shard_io import CorruptSampleError
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.model.flops import Backbone, ModelDims, SampleShape, sample_flops, samples_for
from fvlm_core.model.foveated import FoveatedVLM

PROBED_ROWS = 32
"""Number of evenly spaced samples that estimate the mean FLOPs of each source."""


class Cost:
    """Training FLOPs of a model's samples."""

    def __init__(self, model: FoveatedVLM, loss: LossSettings, *, pairs: bool = False) -> None:
        """`pairs`: batches consist of preference pairs, whose two samples show the same frames."""
        self.pairs = pairs
        self.model: ModelSettings = model.settings
        self.loss = loss
        self.dims = ModelDims.from_configs(model.encoder.config.to_dict(), model.llm.config.to_dict(), self.model.vision.frame_px)
        self._backbones: dict[Backbone, nn.Module] = {"vision": model.encoder, "llm": model.llm}
        self._of = lru_cache(maxsize=4096)(lambda shape, frozen: sample_flops(self.model, self.dims, shape, self.loss, frozen=frozen).train)

    def batch(self, batch: PackedBatch) -> float:
        """FLOPs of training on a batch (on CPU). A frame that several samples show is encoded, and counted, once."""
        shapes = sample_shapes(batch, self.model.tokens_per_frame)
        if self.pairs:
            shapes = [replace(shape, frames=0) if number % 2 else shape for number, shape in enumerate(shapes)]
        frozen = tuple(name for name, part in self._backbones.items() if not any(p.requires_grad for p in part.parameters()))
        return sum(self._of(shape, frozen) for shape in shapes)

    def steps_for(self, shards: ShardSet, data: DataSettings, run: RunSettings) -> int:
        """Return the recipe's number of steps, or the number that its FLOP budget allows."""
        if run.steps is not None:
            return run.steps
        assert run.budget_flops is not None
        mixed = MixedSamples(shards, data, "train", run.seed, tokens_per_frame=self.model.tokens_per_frame)
        per_sample = sum(share * self._mean(shards, data, rows) for share, rows in zip(mixed.shares, mixed.rows, strict=True))
        return max(1, round(samples_for(run.budget_flops, per_sample) / run.batch_samples))

    def _mean(self, shards: ShardSet, data: DataSettings, rows: np.ndarray) -> float:
        costs = []
        for row in rows[np.unique(np.linspace(0, len(rows) - 1, PROBED_ROWS).astype(int))]:
            try:
                sample = shards.read(int(row), image_repeats=data.image_repeats, label_questions=data.loss_on == "all_text")
            except CorruptSampleError:  # the loader reports and counts them
                continue
            samples = sample.pair() if self.pairs else [sample]
            costs.append(self.batch(pack(samples, shards.chat, tokens_per_frame=self.model.tokens_per_frame)))
        return float(np.mean(costs)) if costs else 0.0


def sample_shapes(batch: PackedBatch, tokens_per_frame: int) -> list[SampleShape]:
    """Return the shape of every sample of a batch (on CPU). A frame counts only for the first sample that shows it."""
    shown_frames = batch.shown_frames.tolist()
    shapes, token, frame = [], 0, 0
    encoded: set[int] = set()
    for length, shown, prefix in zip(batch.lengths, batch.shown_counts, batch.query_prefix, strict=True):
        own = set(shown_frames[frame : frame + shown])
        shapes.append(
            SampleShape(
                frames=len(own - encoded),
                shown=shown,
                text_tokens=length - shown * tokens_per_frame,
                labels=int(np.diff(np.searchsorted(batch.labelled, (token, token + length)))[0]),
                query_prefix=prefix,
            )
        )
        encoded |= own
        token, frame = token + length, frame + shown
    return shapes
