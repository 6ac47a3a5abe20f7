"""Gaze before encode: a frame is encoded small (the glance), and a query decides which of its high-resolution patches are encoded at all.

The query reads the glance; its attention over the glance's patches is a distribution p. The `open` likeliest patches are opened: the
`zoom` x `zoom` high-resolution patches under each go through the same DINOv2 layers. They attend to the glance's keys and values and to
the children of their own parent only, so a parent's keys and values do not depend on what else is open, and the glance never sees them.
Then the query reads glance and opened patches, log p(parent) added to the children's logits in every layer: the gradient reaches p through
that. With `levels` above 1, the children that are read most are opened in turn, each time at its level's `zoom` times the resolution.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fvlm_core.config import GlanceSettings
from fvlm_core.model.encoder import Encoder, FrameFeatures
from fvlm_core.model.encoder_layer import Added, EncoderLayer, scaled_sum
from fvlm_core.model.squares import StoredFrames, select, squares
from fvlm_core.model.walk import Walk

LEAST = 1e-6
"""Added to p before its logarithm: a patch that was opened against the odds can still be read."""

Chooser = Callable[[Tensor, int], Tensor]
"""Which k of n patches every row opens, int64 [R, k], from log p [R, n], noise included."""


@dataclass(frozen=True)
class Opened:
    """Patches of one level that were opened, for R rows (frames, or pairs of a frame and a query) with n children each."""

    keys: list[Tensor]
    """Per layer [R, heads, n, head_dim]."""
    values: list[Tensor]
    """Per layer [R, heads, n, head_dim]."""
    parents: Tensor
    """int64 [R, n]: which of the level above's patches each belongs to, counted among those that were open there."""
    roots: Tensor
    """int64 [R, n]: the glance patch each lies under."""
    places: Tensor
    """int64 [R, n]: where each stands on its level's grid, row by row."""

    def select(self, rows: Tensor) -> "Opened":
        """Some rows."""
        keys, values = ([part.index_select(0, rows) for part in parts] for parts in (self.keys, self.values))
        parents, roots, places = (part.index_select(0, rows) for part in (self.parents, self.roots, self.places))
        return Opened(keys, values, parents, roots, places)


@dataclass(frozen=True)
class GlanceFeatures(FrameFeatures):
    """The glance's keys and values, and the frames whose patches may be opened."""

    frames: Tensor | StoredFrames
    """uint8 [F, H, W, 3], or what decodes parts of such."""
    everything: Sequence[Opened] = ()
    """Every patch of every level, where all are read."""

    def select(self, frames: Tensor) -> "GlanceFeatures":
        """The features of some frames; `frames` int64 [f]."""
        small = super().select(frames)
        opened = [level.select(frames) for level in self.everything]
        return GlanceFeatures(small.keys, small.values, None, small.grid, select(self.frames, frames), opened)


@dataclass(frozen=True)
class GlanceRead:
    """What Q queries a frame read of F frames."""

    read: Tensor
    """[F, Q, D] after the final norm."""
    opened: Tensor | None
    """int64 [F, Q, open]: the glance patches that each query opened; None where all were."""
    weights: Tensor | None
    """The last layer's attention [F, heads, Q, 1 + glance patches], an opened patch's added to the glance patch that it lies under."""
    selection_loss: Tensor | None
    """Scalar: the queries' sum of cross-entropy from where they looked, among what was open, to p."""


def likeliest(log_p: Tensor, k: int) -> Tensor:
    """The k patches of the largest p."""
    return log_p.topk(k).indices


def look(encoder: Encoder, frames: Tensor, settings: GlanceSettings) -> GlanceFeatures:
    """Encode the glance of frames uint8 [F, H, W, 3]. Raises ValueError where a side is not a multiple of patch size times `shrink`."""
    step = encoder.patch_px * settings.shrink
    if frames.shape[1] % step or frames.shape[2] % step:
        raise ValueError(f"frames of {frames.shape[1]}x{frames.shape[2]} px: not a multiple of {step}, the side of a glance patch")
    return look_at(encoder, shrunk(frames, settings.shrink), frames)


def look_at(encoder: Encoder, small: Tensor, frames: Tensor | StoredFrames) -> GlanceFeatures:
    """Encode the glance of frames whose small forms [F, h, w, 3] are at hand."""
    glance = encoder.encode(small)
    return GlanceFeatures(glance.keys, glance.values, None, glance.grid, frames)


def with_everything(encoder: Encoder, features: GlanceFeatures, settings: GlanceSettings, scales: Tensor) -> GlanceFeatures:
    """The same with every patch of every level open; `scales` [levels, D] is added to the patches of each level."""
    opened: list[Opened] = []
    roots = places = torch.arange(features.grid[0] * features.grid[1], device=features.frames.device).expand(len(features.frames), -1)
    for level in range(settings.levels):
        every = torch.arange(places.shape[1], device=places.device).expand(len(places), -1)
        children = children_of(encoder, features, settings, scales, level, every, places, roots)
        opened.append(open_patches(encoder, features, children))
        places, roots = opened[-1].places, opened[-1].roots
    return replace(features, everything=opened)


@dataclass(frozen=True)
class Children:
    """Patches of one level about to be encoded, for R rows with n of them each."""

    x: Tensor
    """[R, n, D]: embedded."""
    siblings: Tensor
    """bool [n, n]: who has the same parent."""
    parents: Tensor
    """As in `Opened`, like the rest."""
    roots: Tensor
    places: Tensor


def children_of(
    encoder: Encoder,
    features: GlanceFeatures,
    settings: GlanceSettings,
    scales: Tensor,
    level: int,
    chosen: Tensor,
    places: Tensor,
    roots: Tensor,
    rows: Tensor | None = None,
) -> Children:
    """The children of `chosen` int64 [R, k] among the patches that stand at `places` [R, n] of the grid at `level` (0: the glance).

    `rows` int64 [R]: the frame of each row, where a row is not a frame.
    """
    zoom, columns = settings.zooms[level], features.grid[1] * math.prod(settings.zooms[:level])
    above = places.gather(1, chosen)
    offsets = torch.arange(zoom, device=above.device)
    down = (above // columns)[..., None, None] * zoom + offsets[:, None]
    right = (above % columns)[..., None, None] * zoom + offsets
    down, right = (part.expand(-1, -1, zoom, zoom).flatten(1) for part in (down, right))
    x = _embed(encoder, features, settings, level, down, right, rows) + scales[level]
    parent = torch.arange(chosen.shape[1], device=x.device).repeat_interleave(zoom**2)
    parents, under = (part.repeat_interleave(zoom**2, dim=1) for part in (chosen, roots.gather(1, chosen)))
    return Children(x, parent[:, None] == parent, parents, under, down * (columns * zoom) + right)


def open_patches(encoder: Encoder, features: GlanceFeatures, children: Children, rows: Tensor | None = None) -> Opened:
    """Encode what `children_of` gave, of the same `rows`."""
    x = children.x
    seen = F.pad(children.siblings, (features.keys[0].shape[2], 0), value=True)  # [n, glance + n]
    added: Added = None
    keys, values = [], []
    for number, layer in enumerate(encoder.layers):
        if number == len(encoder.layers) - 1:
            key, value, *_ = layer.keys_values(x, added)
        else:
            context = [part[number] if rows is None else part[number].index_select(0, rows) for part in (features.keys, features.values)]
            if encoder.gradient_checkpointing and torch.is_grad_enabled():
                x, more, key, value, _ = checkpoint(layer, scaled_sum(x, added), None, *context, seen, use_reentrant=False)
            else:
                x, more, key, value, _ = layer(x, added, *context, seen)
            added = layer.added(more)
        keys.append(key)
        values.append(value)
    return Opened(keys, values, children.parents, children.roots, children.places)


def foveate(
    encoder: Encoder,
    features: GlanceFeatures,
    queries: Tensor,
    settings: GlanceSettings,
    scales: Tensor,
    temperature: float = 1.0,
    *,
    chooser: Chooser = likeliest,
    explore: float = 0.0,
    weights: bool = False,
    teach: bool = False,
) -> GlanceRead:
    """Read F frames with queries [F, Q, D], each of which opens its own patches, or weighs all where the features hold everything.

    `explore`: scale of the Gumbel noise on log p when patches are chosen. `weights` and `teach` ask for the parts of the result.
    """
    n_frames, n_queries = queries.shape[:2]
    own = not features.everything  # then a row is a query, not a frame
    rows = None
    if own and n_queries > 1:
        rows = torch.arange(n_frames, device=queries.device).repeat_interleave(n_queries)
    q = queries.flatten(0, 1)[:, None] if own else queries
    last = encoder.layers[-1]
    n_glance = features.keys[0].shape[2]
    walk = None
    if own and not torch.is_grad_enabled():
        walk = Walk(encoder, features, temperature, _most_children(settings, n_glance - 1), rows)
        keys, values = walk.keys, walk.values
    else:
        keys, values = (
            [part if rows is None else part.index_select(0, rows) for part in parts] for parts in (features.keys, features.values)
        )
    bias = q.new_zeros(len(q), 1, q.shape[1], n_glance)
    roots = places = torch.arange(n_glance - 1, device=q.device).expand(len(q), -1)
    entering = to_last(encoder, keys, values, q, temperature, None)
    roots_of: list[Tensor] = []
    chosen: list[Tensor] = []
    logs: list[Tensor] = []
    for level in range(settings.levels):
        log_p = (selection(last, keys[-1], entering, temperature, bias if level else None, places.shape[1]) + LEAST).log()
        if own:
            noise = 0.0 if not explore else -torch.empty_like(log_p).exponential_().log() * explore
            picked = chooser((log_p + noise)[:, 0], min(settings.open, places.shape[1]))
            children = children_of(encoder, features, settings, scales, level, picked, places, roots, rows)
            opened = children if walk else open_patches(encoder, features, children, rows)
            chosen.append(picked)
        else:
            opened = features.everything[level]
        logs.append(log_p.gather(2, opened.parents[:, None].expand(-1, q.shape[1], -1)))
        bias = torch.cat([bias, logs[-1][:, None].to(bias.dtype)], dim=-1)
        if walk is not None and isinstance(opened, Children):
            entering = walk.open(opened.x, opened.siblings, q, bias)
            keys, values = walk.keys, walk.values
        elif isinstance(opened, Opened):
            keys, values = (
                [torch.cat(pair, dim=2) for pair in zip(before, new, strict=True)]
                for before, new in ((keys, opened.keys), (values, opened.values))
            )
            entering = to_last(encoder, keys, values, q, temperature, bias)
        places, roots = opened.places, opened.roots
        roots_of.append(roots)
    attended = None
    if weights or teach:
        with torch.no_grad():
            attended = last.weights(entering, keys[-1], temperature, bias)
    loss = None
    if teach and own and attended is not None:
        loss = _selection_loss(attended.mean(1)[:, 0, n_glance:], [log[:, 0] for log in logs], settings.zooms)
    result = encoder.norm(last.query(entering, keys[-1], values[-1], temperature, bias))
    pooled = None if attended is None or not weights else _pooled(attended, roots_of, n_glance)
    if not own:
        return GlanceRead(result, None, pooled, loss)
    if pooled is not None:
        pooled = pooled.unflatten(0, (n_frames, n_queries))[:, :, :, 0].transpose(1, 2)
    return GlanceRead(result[:, 0].unflatten(0, (n_frames, n_queries)), chosen[0].unflatten(0, (n_frames, n_queries)), pooled, loss)


def to_last(encoder: Encoder, keys: list[Tensor], values: list[Tensor], q: Tensor, temperature: float, bias: Tensor | None) -> Tensor:
    """Queries [R, Q, D] that read what is open so far, as they enter the last layer."""
    for layer, key, value in zip(encoder.layers[:-1], keys[:-1], values[:-1], strict=True):
        q = layer.query(q, key, value, temperature, bias)
    return q


def selection(last: EncoderLayer, key: Tensor, entering: Tensor, temperature: float, bias: Tensor | None, n: int) -> Tensor:
    """p [R, Q, n] over the last n of keys [R, heads, N, head_dim]: the last layer's attention, mean of heads, of queries entering it."""
    logits = last.logits(entering, key, temperature, bias)
    p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).mean(1)[..., -n:]
    return p / p.sum(-1, keepdim=True).clamp(min=LEAST)


def shrunk(frames: Tensor, times: int) -> Tensor:
    """Frames uint8 [F, H, W, 3] at 1 / `times` of their side, float32: the mean of each square of `times` x `times` pixels."""
    apart = frames.unflatten(1, (-1, times))
    rows = apart[:, :, 0].to(torch.int32 if times > 128 else torch.int16)
    for number in range(1, times):  # `sum` would first make all of the frame as wide as its result
        rows += apart[:, :, number]
    return rows.unflatten(2, (-1, times)).sum(3, dtype=torch.int32).float() / times**2


def positions_at(encoder: Encoder, grid: tuple[int, int], down: Tensor, right: Tensor) -> Tensor:
    """Position embeddings [..., D] of the patches in row `down` [...] and column `right` [...] of a grid.

    DINOv2's table, resampled at the patches' centres as `Encoder.positions` resamples it for a complete grid, but only there.
    """
    own = encoder.image_px // encoder.patch_px
    table = encoder.position_embeddings[0, 1:]
    if grid == (own, own):
        return table[down * own + right]
    centres = torch.stack([(right + 0.5) / grid[1], (down + 0.5) / grid[0]], dim=-1).float() * 2 - 1  # grid_sample's order is x, y
    square = table.unflatten(0, (own, own)).permute(2, 0, 1)[None].float()
    sampled = F.grid_sample(square, centres.reshape(1, 1, -1, 2), mode="bicubic", padding_mode="border", align_corners=False)
    return sampled[0, :, 0].T.unflatten(0, down.shape).to(table.dtype)


def _embed(
    encoder: Encoder, features: GlanceFeatures, settings: GlanceSettings, level: int, down: Tensor, right: Tensor, rows: Tensor | None
) -> Tensor:
    """Embeddings [R, n, D] of the patches in row `down` [R, n] and column `right` [R, n] of the grid below `level`."""
    size = encoder.patch_px
    scale = math.prod(settings.zooms[level + 1 :])  # the frames are of the last level's resolution
    finer = settings.shrink // scale
    grid = (features.grid[0] * finer, features.grid[1] * finer)
    frame = torch.arange(len(features.frames), device=down.device) if rows is None else rows
    patches = squares(features.frames, frame, down, right, scale * size)
    weight = encoder.patches.weight
    pixels = (shrunk(patches, scale) if scale > 1 else patches).permute(0, 3, 1, 2).to(weight.dtype)
    assert pixels.shape[-1] == size
    pixels = ((pixels - encoder.pixel_mean) / encoder.pixel_std).flatten(1)
    embedded = F.linear(pixels, weight.flatten(1), encoder.patches.bias).unflatten(0, down.shape)
    return embedded + positions_at(encoder, grid, down, right).to(embedded.dtype)


def _selection_loss(attended: Tensor, logs: list[Tensor], zooms: list[int]) -> Tensor:
    """Sum over rows and levels of the cross-entropy from where a query looked to log p of the parents it had opened.

    `attended` [R, n of all levels]: its attention to opened patches; `logs`: per level, log p of every opened patch's parent [R, n].
    """
    loss = attended.new_zeros(())
    for weights, log_p, zoom in zip(attended.split([log.shape[1] for log in logs], dim=1), logs, zooms, strict=True):
        by_parent = weights.unflatten(1, (-1, zoom**2)).sum(2)
        target = by_parent / by_parent.sum(1, keepdim=True).clamp(min=LEAST)
        loss = loss - (target * log_p[:, :: zoom**2]).sum()
    return loss


def _most_children(settings: GlanceSettings, patches: int) -> int:
    """Patches that a query opens, all levels together."""
    total = 0
    for zoom in settings.zooms:
        patches = min(settings.open, patches) * zoom**2
        total += patches
    return total


def _pooled(attended: Tensor, levels: list[Tensor], n_glance: int) -> Tensor:
    """Attention [R, heads, Q, 1 + glance patches], that of opened patches added to those above: `levels` int64 [R, n] each."""
    pooled, *opened = attended.split([n_glance, *(roots.shape[1] for roots in levels)], dim=-1)
    for weights, roots in zip(opened, levels, strict=True):
        pooled = pooled.scatter_add(-1, roots[:, None, None].expand_as(weights) + 1, weights)
    return pooled
