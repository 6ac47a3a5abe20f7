"""Gaze before encode: a frame is encoded at low resolution (the glance), and a query chooses which high-resolution patches to encode.

The query reads the glance; its attention over the glance patches is a distribution p. The `open` most likely patches are opened: the
`zoom` x `zoom` high-resolution patches under each go through the same DINOv2 layers. These children attend only to the glance's keys and
values and to the children of the same parent, so their keys and values do not depend on what else is open. The glance never attends to
them. Then the query reads glance and opened patches, with log p(parent) added to the children's logits in every layer; through this term,
gradients reach p. With `levels` above 1, the children with the most attention are opened next, each level at `zoom` times the resolution.
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
from fvlm_core.model.encoder_layer import EncoderLayer, PendingResidual, scaled_sum
from fvlm_core.model.joint_pass import JointPass
from fvlm_core.model.patch_pixels import StoredFrames, patch_pixels, select

EPSILON = 1e-6
"""Added to p before the logarithm, so that a patch opened despite a tiny p can still be read."""

Chooser = Callable[[Tensor, int], Tensor]
"""Chooses the patches to open: (log p [R, n] including noise, k) -> indices int64 [R, k]."""


@dataclass(frozen=True)
class Opened:
    """Opened patches of one level, for R rows (frames, or pairs of a frame and a query) with n patches each."""

    keys: list[Tensor]
    """Per layer [R, heads, n, head_dim]."""
    values: list[Tensor]
    """Per layer [R, heads, n, head_dim]."""
    parents: Tensor
    """int64 [R, n]: index of each patch's parent among the open patches of the level above."""
    roots: Tensor
    """int64 [R, n]: the glance patch above each patch."""
    places: Tensor
    """int64 [R, n]: position of each patch on its level's grid, in row-major order."""

    def select(self, rows: Tensor) -> "Opened":
        """Return the rows with indices `rows` int64 [r]."""
        keys, values = ([part.index_select(0, rows) for part in parts] for parts in (self.keys, self.values))
        parents, roots, places = (part.index_select(0, rows) for part in (self.parents, self.roots, self.places))
        return Opened(keys, values, parents, roots, places)


@dataclass(frozen=True)
class GlanceFeatures(FrameFeatures):
    """Keys and values of the glance, and the full-resolution frames to open patches of."""

    frames: Tensor | StoredFrames
    """uint8 [F, H, W, 3], or stored frames that decode the opened parts."""
    all_patches: Sequence[Opened] = ()
    """Per level, every patch of it. Empty unless all patches are read, as in training with `train_on: all`."""

    def select(self, frames: Tensor) -> "GlanceFeatures":
        """Return the features of the frames with indices `frames` int64 [f]."""
        small = super().select(frames)
        opened = [level.select(frames) for level in self.all_patches]
        return GlanceFeatures(small.keys, small.values, None, small.grid, select(self.frames, frames), opened)


@dataclass(frozen=True)
class GlanceRead:
    """Result of reading F frames with Q queries each."""

    read: Tensor
    """[F, Q, D] after the final norm."""
    opened: Tensor | None
    """int64 [F, Q, open]: the glance patches that each query opened; None if all patches were open."""
    weights: Tensor | None
    """Last-layer attention weights [F, heads, Q, 1 + glance patches]; an opened patch's weight is added to its glance patch."""
    selection_loss: Tensor | None
    """Scalar: cross-entropy of p against the queries' attention over the opened patches, summed over queries and levels."""


def most_likely(log_p: Tensor, k: int) -> Tensor:
    """Choose the k patches with the largest p (the default `Chooser`)."""
    return log_p.topk(k).indices


def encode_glance(encoder: Encoder, frames: Tensor, settings: GlanceSettings) -> GlanceFeatures:
    """Encode the glance of frames uint8 [F, H, W, 3]. Raises ValueError unless both sides are multiples of patch size times `shrink`."""
    step = encoder.patch_px * settings.shrink
    if frames.shape[1] % step or frames.shape[2] % step:
        raise ValueError(f"frames of {frames.shape[1]}x{frames.shape[2]} px: not a multiple of {step}, the side of a glance patch")
    return encode_downscaled(encoder, downscale(frames, settings.shrink), frames)


def encode_downscaled(encoder: Encoder, small: Tensor, frames: Tensor | StoredFrames) -> GlanceFeatures:
    """Encode the glance of frames that are already available at low resolution, `small` [F, h, w, 3]."""
    glance = encoder.encode(small)
    return GlanceFeatures(glance.keys, glance.values, None, glance.grid, frames)


def with_all_patches(encoder: Encoder, features: GlanceFeatures, settings: GlanceSettings, scales: Tensor) -> GlanceFeatures:
    """Return the features with every patch of every level encoded. `scales` [levels, D]: added to the embeddings of each level."""
    opened: list[Opened] = []
    roots = places = torch.arange(features.grid[0] * features.grid[1], device=features.frames.device).expand(len(features.frames), -1)
    for level in range(settings.levels):
        every = torch.arange(places.shape[1], device=places.device).expand(len(places), -1)
        children = children_of(encoder, features, settings, scales, level, every, places, roots)
        opened.append(open_patches(encoder, features, children))
        places, roots = opened[-1].places, opened[-1].roots
    return replace(features, all_patches=opened)


@dataclass(frozen=True)
class Children:
    """Embedded patches of one level, not yet encoded, for R rows with n patches each."""

    x: Tensor
    """[R, n, D]: embeddings."""
    siblings: Tensor
    """bool [n, n]: whether two patches have the same parent."""
    parents: Tensor
    """`parents`, `roots` and `places` as in `Opened`."""
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
    """Embed the children of the patches `chosen`.

    `chosen` int64 [R, k]: indices into the n open patches, which are at `places` [R, n] on the grid of `level` (0: the glance) and under
    the glance patches `roots` [R, n]. `rows` int64 [R]: frame index of each row; None if rows are frames.
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
    """Encode the patches returned by `children_of` for the same `rows`."""
    x = children.x
    mask = F.pad(children.siblings, (features.keys[0].shape[2], 0), value=True)  # [n, glance + n]
    residual: PendingResidual = None
    keys, values = [], []
    for number, layer in enumerate(encoder.layers):
        if number == len(encoder.layers) - 1:
            key, value, *_ = layer.keys_values(x, residual)
        else:
            context = [part[number] if rows is None else part[number].index_select(0, rows) for part in (features.keys, features.values)]
            if encoder.gradient_checkpointing and torch.is_grad_enabled():
                x, more, key, value, _ = checkpoint(layer, scaled_sum(x, residual), None, *context, mask, use_reentrant=False)
            else:
                x, more, key, value, _ = layer(x, residual, *context, mask)
            residual = layer.pending_residual(more)
        keys.append(key)
        values.append(value)
    return Opened(keys, values, children.parents, children.roots, children.places)


def read_with_glance(
    encoder: Encoder,
    features: GlanceFeatures,
    queries: Tensor,
    settings: GlanceSettings,
    scales: Tensor,
    temperature: float = 1.0,
    *,
    chooser: Chooser = most_likely,
    explore: float = 0.0,
    weights: bool = False,
    teach: bool = False,
) -> GlanceRead:
    """Read F frames with queries [F, Q, D]. Each query opens its own patches, or reads all of them if `features.all_patches` is set.

    `explore`: scale of the Gumbel noise added to log p when choosing patches. `weights`: return attention weights. `teach`: return the
    selection loss.
    """
    n_frames, n_queries = queries.shape[:2]
    own = not features.all_patches  # then each row is one query of a frame
    rows = None
    if own and n_queries > 1:
        rows = torch.arange(n_frames, device=queries.device).repeat_interleave(n_queries)
    q = queries.flatten(0, 1)[:, None] if own else queries
    last = encoder.layers[-1]
    n_glance = features.keys[0].shape[2]
    joint = None
    if own and not torch.is_grad_enabled():
        joint = JointPass(encoder, features, temperature, _most_children(settings, n_glance - 1), rows)
        keys, values = joint.keys, joint.values
    else:
        keys, values = (
            [part if rows is None else part.index_select(0, rows) for part in parts] for parts in (features.keys, features.values)
        )
    bias = q.new_zeros(len(q), 1, q.shape[1], n_glance)
    roots = places = torch.arange(n_glance - 1, device=q.device).expand(len(q), -1)
    last_input = run_to_last_layer(encoder, keys, values, q, temperature, None)
    roots_of: list[Tensor] = []
    chosen: list[Tensor] = []
    logs: list[Tensor] = []
    for level in range(settings.levels):
        log_p = (selection(last, keys[-1], last_input, temperature, bias if level else None, places.shape[1]) + EPSILON).log()
        if own:
            noise = 0.0 if not explore else -torch.empty_like(log_p).exponential_().log() * explore
            picked = chooser((log_p + noise)[:, 0], min(settings.open, places.shape[1]))
            children = children_of(encoder, features, settings, scales, level, picked, places, roots, rows)
            opened = children if joint else open_patches(encoder, features, children, rows)
            chosen.append(picked)
        else:
            opened = features.all_patches[level]
        logs.append(log_p.gather(2, opened.parents[:, None].expand(-1, q.shape[1], -1)))
        bias = torch.cat([bias, logs[-1][:, None].to(bias.dtype)], dim=-1)
        if joint is not None and isinstance(opened, Children):
            last_input = joint.open(opened.x, opened.siblings, q, bias)
            keys, values = joint.keys, joint.values
        elif isinstance(opened, Opened):
            keys, values = (
                [torch.cat(pair, dim=2) for pair in zip(before, new, strict=True)]
                for before, new in ((keys, opened.keys), (values, opened.values))
            )
            last_input = run_to_last_layer(encoder, keys, values, q, temperature, bias)
        places, roots = opened.places, opened.roots
        roots_of.append(roots)
    attended = None
    if weights or teach:
        with torch.no_grad():
            attended = last.weights(last_input, keys[-1], temperature, bias)
    loss = None
    if teach and own and attended is not None:
        loss = _selection_loss(attended.mean(1)[:, 0, n_glance:], [log[:, 0] for log in logs], settings.zooms)
    result = encoder.norm(last.query(last_input, keys[-1], values[-1], temperature, bias))
    pooled = None if attended is None or not weights else _pooled(attended, roots_of, n_glance)
    if not own:
        return GlanceRead(result, None, pooled, loss)
    if pooled is not None:
        pooled = pooled.unflatten(0, (n_frames, n_queries))[:, :, :, 0].transpose(1, 2)
    return GlanceRead(result[:, 0].unflatten(0, (n_frames, n_queries)), chosen[0].unflatten(0, (n_frames, n_queries)), pooled, loss)


def run_to_last_layer(
    encoder: Encoder, keys: list[Tensor], values: list[Tensor], q: Tensor, temperature: float, bias: Tensor | None
) -> Tensor:
    """Run queries [R, Q, D] through all layers but the last; return the last layer's inputs [R, Q, D]."""
    for layer, key, value in zip(encoder.layers[:-1], keys[:-1], values[:-1], strict=True):
        q = layer.query(q, key, value, temperature, bias)
    return q


def selection(last: EncoderLayer, key: Tensor, last_input: Tensor, temperature: float, bias: Tensor | None, n: int) -> Tensor:
    """Return p [R, Q, n] over the last n of the keys [R, heads, N, head_dim].

    It is the last layer's attention, averaged over heads and renormalised, of queries with last-layer inputs `last_input` [R, Q, D].
    """
    logits = last.logits(last_input, key, temperature, bias)
    p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).mean(1)[..., -n:]
    return p / p.sum(-1, keepdim=True).clamp(min=EPSILON)


def downscale(frames: Tensor, times: int) -> Tensor:
    """Downscale frames uint8 [F, H, W, 3] by the factor `times` to float32: the mean of each square of `times` x `times` pixels."""
    apart = frames.unflatten(1, (-1, times))
    rows = apart[:, :, 0].to(torch.int32 if times > 128 else torch.int16)
    for number in range(1, times):  # `sum` would first convert the whole frame to the result's dtype
        rows += apart[:, :, number]
    return rows.unflatten(2, (-1, times)).sum(3, dtype=torch.int32).float() / times**2


def positions_at(encoder: Encoder, grid: tuple[int, int], down: Tensor, right: Tensor) -> Tensor:
    """Position embeddings [..., D] of the patches in row `down` [...] and column `right` [...] of a grid.

    Equal to those of `Encoder.positions` for the complete grid, but only sampled at the centres of these patches.
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
    """Embed the patches in row `down` [R, n] and column `right` [R, n] of the grid of the children of `level`; returns [R, n, D]."""
    size = encoder.patch_px
    scale = math.prod(settings.zooms[level + 1 :])  # the frames are of the last level's resolution
    finer = settings.shrink // scale
    grid = (features.grid[0] * finer, features.grid[1] * finer)
    frame = torch.arange(len(features.frames), device=down.device) if rows is None else rows
    patches = patch_pixels(features.frames, frame, down, right, scale * size)
    weight = encoder.patches.weight
    pixels = (downscale(patches, scale) if scale > 1 else patches).permute(0, 3, 1, 2).to(weight.dtype)
    assert pixels.shape[-1] == size
    pixels = ((pixels - encoder.pixel_mean) / encoder.pixel_std).flatten(1)
    embedded = F.linear(pixels, weight.flatten(1), encoder.patches.bias).unflatten(0, down.shape)
    return embedded + positions_at(encoder, grid, down, right).to(embedded.dtype)


def _selection_loss(attended: Tensor, logs: list[Tensor], zooms: list[int]) -> Tensor:
    """Cross-entropy of p against the attention over opened patches, by parent, summed over rows and levels.

    `attended` [R, n of all levels]: attention to opened patches. `logs`: per level, log p of each opened patch's parent [R, n].
    """
    loss = attended.new_zeros(())
    for weights, log_p, zoom in zip(attended.split([log.shape[1] for log in logs], dim=1), logs, zooms, strict=True):
        by_parent = weights.unflatten(1, (-1, zoom**2)).sum(2)
        target = by_parent / by_parent.sum(1, keepdim=True).clamp(min=EPSILON)
        loss = loss - (target * log_p[:, :: zoom**2]).sum()
    return loss


def _most_children(settings: GlanceSettings, patches: int) -> int:
    """Number of patches that a query opens, summed over levels."""
    total = 0
    for zoom in settings.zooms:
        patches = min(settings.open, patches) * zoom**2
        total += patches
    return total


def _pooled(attended: Tensor, levels: list[Tensor], n_glance: int) -> Tensor:
    """Add the attention on opened patches to their glance patches; returns [R, heads, Q, 1 + glance patches].

    `levels`: per level, the glance patch above each opened patch, int64 [R, n].
    """
    pooled, *opened = attended.split([n_glance, *(roots.shape[1] for roots in levels)], dim=-1)
    for weights, roots in zip(opened, levels, strict=True):
        pooled = pooled.scatter_add(-1, roots[:, None, None].expand_as(weights) + 1, weights)
    return pooled
