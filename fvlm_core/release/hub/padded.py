"""Convert between transformers' padded batches and the packed batches that the model reads.

A padded batch has B rows of S columns: `input_ids` (a placeholder for visual tokens), `attention_mask`, `frame_ids` (the index in `frames`
of a visual token's frame, NO_FRAME for text) and `query_offsets` (how many tokens back is the one whose hidden state gives the frame's
query; 0 for the learned first query). Both sides may be padded, and rows may be repeated for beams: each frame is encoded once.
"""

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fvlm_core.data.batch import IGNORE, NO_SOURCE, PackedBatch, _showings

NO_FRAME = -1
"""Value of `frame_ids` for text."""


def packed_batch(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    frames: Tensor | None,
    frame_ids: Tensor | None,
    query_offsets: Tensor | None,
    labels: Tensor | None = None,
    *,
    tokens_per_frame: int,
) -> PackedBatch:
    """Concatenate rows [B, S] without their padding. `labels` [B, S] are unshifted, as in transformers.

    `frame_ids` and `query_offsets` may be shorter than `input_ids`: the columns that they lack are generated text. Raises ValueError for a
    frame with another number of tokens than `tokens_per_frame`, and for several rows that do not show all frames: rows that were processed
    one by one and then put together would all count their frames from 0.
    """
    kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    lengths = kept.sum(1).tolist()
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shown_in = _as_long(frame_ids, input_ids, NO_FRAME)[kept]
    is_visual = shown_in >= 0
    visual = is_visual.nonzero().flatten()
    if len(visual) % tokens_per_frame:
        raise ValueError(f"{len(visual)} tokens of frames, but {tokens_per_frame} per frame")
    positions = visual.view(-1, tokens_per_frame)
    offsets = _as_long(query_offsets, input_ids, 0)[kept][positions]
    sources = torch.where(offsets > 0, positions - offsets, NO_SOURCE)
    shown = shown_in[positions[:, 0]]
    targets = torch.full_like(input_ids, IGNORE) if labels is None else labels
    targets = targets[kept].masked_fill(is_visual, IGNORE).roll(-1)
    targets[torch.from_numpy(starts[1:] - 1).to(targets.device)] = IGNORE  # the last of a row: `roll` gave it the next row's first
    labelled = (targets != IGNORE).nonzero().flatten().cpu().numpy()
    frames = input_ids.new_zeros((0, 1, 1, 3), dtype=torch.uint8) if frames is None else frames
    known = int(shown.max()) + 1 if len(shown) else 0
    if known > len(frames) or (known < len(frames) and len(input_ids) > 1):
        raise ValueError(
            f"{len(frames)} frames, but frame_ids names {known}: give the processor all conversations of a batch at once "
            "(a pipeline: batch_size=1), and do not put its outputs together"
        )
    host_positions, host_sources = positions.cpu().numpy(), sources.cpu().numpy()
    samples = list(pairwise(starts.tolist()))
    batch = PackedBatch(
        frames=frames,
        input_ids=input_ids[kept].masked_fill(is_visual, 0),
        labels=targets,
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        shown_frames=shown,
        visual_positions=positions,
        query_sources=sources,
        showings=_showings(shown.cpu().numpy(), len(frames)),
        lengths=lengths,
        shown_counts=[len(_within(host_positions[:, 0], start, end)) for start, end in samples],
        query_prefix=[int(_within(host_sources, start, end).max(initial=start - 1)) + 1 - start for start, end in samples],
        label_prefix=[int(_within(labelled, start, end).max(initial=start - 1)) + 1 - start for start, end in samples],
        labelled=labelled,
    )
    return batch.to(input_ids.device)


def padded(packed: Tensor, attention_mask: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Unpack values [S, ...] of a packed batch to rows [B, columns, ...], with 0 at padding."""
    if attention_mask is None or len(packed) == shape[0] * shape[1]:
        return packed.unflatten(0, shape)
    rows = packed.new_zeros(*shape, *packed.shape[1:])
    rows[attention_mask.bool()] = packed
    return rows


def _as_long(tensor: Tensor | None, input_ids: Tensor, text: int) -> Tensor:
    """Extend a tensor [B, s] to [B, S] with the value `text`; None is all text."""
    if tensor is None:
        return torch.full_like(input_ids, text)
    return F.pad(tensor, (0, input_ids.shape[1] - tensor.shape[1]), value=text)


def _within(positions: np.ndarray, start: int, end: int) -> np.ndarray:
    """The positions in [start, end)."""
    return positions[(positions >= start) & (positions < end)]
