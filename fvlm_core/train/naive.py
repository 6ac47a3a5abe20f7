"""The naive training step: a baseline for the tuned one.

Samples are padded to the longest of their micro-batch, logits are computed at every position, every shown frame is encoded (an image shown
eight times, eight times), and all passes run over the complete sequence. Model, samples, batch and precision are the recipe's; the model
runs eagerly, with a plain loader. Only its timing is meaningful: padding is labelled too, so that all positions get logits.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fvlm_core.data.batch import IGNORE, NO_SOURCE, PackedBatch, Showing
from fvlm_core.train.loop import Trainer

PAD = 0


class NaiveTrainer(Trainer):
    """A trainer that pads micro-batches but counts samples and FLOPs without padding."""

    def _accumulate(self, micro_batches: list[PackedBatch], units: int) -> Tensor:
        return super()._accumulate([padded(batch) for batch in micro_batches], units)


def padded(batch: PackedBatch) -> PackedBatch:
    """Pad each sample to the longest, label every position, and store a copy of every shown frame."""
    longest, n = max(batch.lengths), batch.n_samples
    starts = np.repeat(batch.cu_seqlens[:-1].numpy(), batch.lengths)
    sample = np.repeat(np.arange(n), batch.lengths)
    place = torch.from_numpy(sample * longest + np.arange(len(starts)) - starts)  # new position of every old one
    ids = torch.full((n * longest,), PAD).index_copy(0, place, batch.input_ids)
    labels = torch.full((n * longest,), PAD).index_copy(0, place, batch.labels.masked_fill(batch.labels == IGNORE, PAD))
    sources = batch.query_sources
    shown = torch.arange(len(batch.shown_frames))
    return replace(
        batch,
        frames=batch.frames[batch.shown_frames] if len(shown) else batch.frames,
        input_ids=ids,
        labels=labels,
        position_ids=torch.arange(longest).repeat(n),
        cu_seqlens=torch.arange(n + 1, dtype=torch.int32) * longest,
        shown_frames=shown,
        visual_positions=place[batch.visual_positions],
        query_sources=torch.where(sources >= 0, place[sources.clamp(min=0)], NO_SOURCE),
        showings=[Showing(shown, shown[:, None])] if len(shown) else [],
        lengths=[longest] * n,
        query_prefix=[longest if count else 0 for count in batch.shown_counts],
        label_prefix=[longest] * n,
        labelled=np.arange(n * longest),
    )
