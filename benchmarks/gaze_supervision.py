"""Where to look, taught for a while: a loss on the attention itself, for tasks in which every frame's place hangs on the frame before.

In *hunt* the answer says nothing about the second frame's place until the first frame's token holds where its cross stood, and nothing asks
for that before queries use it. Rendered clips know the place, so the last pass's queries can be shown it; the weight of this loss fades to
nothing, and the second half of the training is by the answers alone.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fvlm_core.data.batch import PackedBatch
from fvlm_core.data.gaze import GRID, GazeClip
from fvlm_core.model.attention import PackedLayout
from fvlm_core.model.foveated import FoveatedVLM


def weight_at(step: int, steps: int, weight: float) -> float:
    """Of the loss at a step: all of it at first, falling in a line to 0 at half of the training."""
    return weight * max(0.0, 1.0 - 2.0 * step / steps)


def gaze_loss(model: FoveatedVLM, batch: PackedBatch, clips: Sequence[GazeClip]) -> Tensor:
    """Mean negative log of the last layer's attention (mean of heads) to the patch that counts, of the last pass's queries.

    Clips of `fvlm_core.data.gaze` with a patch a cell, each the frames of one sample of the batch, in order.
    """
    features = model.encode(batch.frames)
    text = model.embed(batch.input_ids)
    layout = PackedLayout(batch.lengths)
    read, queries = model.read_coarse(features, batch), None
    for _ in range(model.settings.fine_iterations):
        read = read if queries is None else model.read_fine(features, queries, batch)
        seen = text.index_copy(0, batch.visual_positions.flatten(), read.tokens.flatten(0, 1).to(text.dtype))
        queries = model.queries(model.contextualise(seen, batch.position_ids, layout), batch)
    encoder, temperature = model.encoder, model.connector.temperature
    shown = features.select(batch.shown_frames)
    assert queries is not None
    q = model.connector.query_input_proj(queries)
    for layer, key, value in zip(encoder.layers[:-1], shown.keys, shown.values, strict=False):
        q = layer.query(q, key, value, temperature)
    attention = encoder.layers[-1].weights(q, shown.keys[-1], temperature).mean(1)[:, 0]  # [V, 1 + patches]
    counts = torch.from_numpy(1 + np.concatenate([clip.path for clip in clips]) @ (GRID, 1))
    return -attention.gather(1, counts[:, None]).clamp(min=1e-6).log().mean()
