"""The training step as an ordinary implementation does it: what the tuned one is compared with.

Samples are padded to the longest of their micro-batch, every position has logits, every shown frame is encoded (an image shown eight times,
eight times), both passes run over the complete sequence. It is the same model on the same samples with the recipe's batch and precision,
eager, read by a plain loader. Only its time means something: padding is labelled too, as full logits have it.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fvlm_core.data.batch import IGNORE, NO_SOURCE, PackedBatch, Showing
from fvlm_core.train.loop import Trainer

PAD = 0


class NaiveTrainer(Trainer):
    """Counts what was asked for (samples, useful FLOPs), and computes it padded."""

    def _accumulate(self, micro_batches: list[PackedBatch], units: int) -> Tensor:
        return super()._accumulate([padded(batch) for batch in micro_batches], units)


def padded(batch: PackedBatch) -> PackedBatch:
    """The same samples, each as long as the longest, with labels everywhere and each shown frame stored by itself."""
    longest, n = max(batch.lengths), batch.n_samples
    starts = np.repeat(batch.cu_seqlens[:-1].numpy(), batch.lengths)
    sample = np.repeat(np.arange(n), batch.lengths)
    place = torch.from_numpy(sample * longest + np.arange(len(starts)) - starts)  # of every old position
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
