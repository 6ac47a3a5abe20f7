"""The selectors that `benchmarks.selectors` compares: which patches to open, or what to encode instead of a glance.

A chooser is a function for `FoveatedVLM.chooser`: it maps log p [R, n], with R = clips x frames, and k to patch indices [R, k]. A chooser
that looks at pixels is made for one batch. An encoding replaces `FoveatedVLM.encode`.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.foveation_world import ZOOM, at_random, oracle
from fvlm_core.data.cells_world import World
from fvlm_core.model.encoder import FrameFeatures
from fvlm_core.model.encoder_layer import PendingResidual
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.glance import Chooser, downscale, encode_glance, most_likely, with_all_patches

LOW_SIDE = 4
"""Patches per side of a low-resolution frame: the square whose FLOPs are nearest to a 3 x 3 glance with one patch opened."""


def chooser(selector: str, world: World) -> Chooser:
    """Return the chooser of a selector for the clips of `world`; `most_likely` for selectors that open no patches."""
    frames = torch.from_numpy(world.frames)
    if selector == "question":
        return partial(from_first_frame, frames.shape[1])
    if selector == "change":
        return partial(largest, change(frames))
    if selector == "saliency":
        return partial(largest, unexplained(frames.flatten(0, 1)))
    if selector == "oracle":
        return partial(oracle, wanted(world).flatten())
    return {"random": at_random, "centre": central}.get(selector, most_likely)


def wanted(world: World) -> Tensor:
    """Return the glance patches [B, T] that cover the target cells."""
    return torch.from_numpy(world.path // ZOOM) @ torch.tensor([world.digits.shape[-1] // ZOOM, 1])


def largest(scores: Tensor, log_p: Tensor, k: int) -> Tensor:
    """Return the patches with the largest scores [R, n], independent of the query."""
    assert scores.shape == log_p.shape
    return scores.topk(k).indices


def from_first_frame(frames: int, log_p: Tensor, k: int) -> Tensor:
    """Open the first frame's patches in all frames of a clip. The first frame's query has read the question and no frame."""
    return log_p.unflatten(0, (-1, frames))[:, 0].topk(k).indices.repeat_interleave(frames, 0)


def central(log_p: Tensor, k: int) -> Tensor:
    """Return the patches nearest to the centre."""
    side = round(log_p.shape[1] ** 0.5)
    off = (torch.arange(side) - (side - 1) / 2) ** 2
    return (-(off[:, None] + off).flatten()).topk(k).indices.expand(len(log_p), -1)


def change(frames: Tensor) -> Tensor:
    """Return the summed squared difference [B * T, n] of each glance patch from the previous frame, for frames uint8 [B, T, S, S, 3].

    The first frame of a clip has no previous frame; it is scored by `unexplained`.
    """
    glances = downscale(frames.flatten(0, 1), ZOOM).unflatten(0, frames.shape[:2])
    first = unexplained(frames[:, 0])[:, None]
    later = per_patch((glances[:, 1:] - glances[:, :-1]).flatten(0, 1) ** 2, first.shape[-1])
    return torch.cat([first, later.unflatten(0, (len(frames), -1))], 1).flatten(0, 1)


def unexplained(frames: Tensor) -> Tensor:
    """Return the summed squared error [F, n] of the enlarged glance under each glance patch, for frames uint8 [F, S, S, 3]."""
    glance = downscale(frames, ZOOM).permute(0, 3, 1, 2)
    enlarged = F.interpolate(glance, size=frames.shape[1:3], mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    side = frames.shape[1] // (14 * ZOOM)
    return per_patch((frames - enlarged) ** 2, side**2)


def per_patch(pixels: Tensor, n: int) -> Tensor:
    """Sum pixels [F, S, S, 3] over the squares that n glance patches cover: [F, n]."""
    side = round(n**0.5)
    return pixels.unflatten(1, (side, -1)).unflatten(3, (side, -1)).sum((2, 4, 5)).flatten(1)


def everything(model: FoveatedVLM, frames: Tensor) -> FrameFeatures:
    """Encode the glance and all patches under it, weighted by p."""
    settings = model.settings.glance
    assert settings is not None
    return with_all_patches(model.encoder, encode_glance(model.encoder, frames, settings), settings, model.connector.scale_embeddings)


def low_resolution(model: FoveatedVLM, frames: Tensor) -> FrameFeatures:
    """Encode complete frames at `LOW_SIDE` patches per side."""
    side = LOW_SIDE * model.encoder.patch_px
    pixels = frames.permute(0, 3, 1, 2).float()
    small = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return model.encoder.encode(small.permute(0, 2, 3, 1))


def merged(model: FoveatedVLM, frames: Tensor) -> FrameFeatures:
    """Embed all patches, then merge them by similarity down to the number of tokens of a glance with one opened patch.

    The bipartite matching of Bolya et al. 2022, https://arxiv.org/abs/2210.09461, applied once before the layers. Similarity is of the
    content of patches without their positions, so empty cells are merged first, which favours digits.
    """
    encoder = model.encoder
    grid = (frames.shape[1] // encoder.patch_px, frames.shape[2] // encoder.patch_px)
    embedded = encoder.embed(frames)
    patches = embedded[:, 1:]
    left = grid[0] * grid[1] // ZOOM**2 + ZOOM**2
    x = torch.cat([embedded[:, :1], merge(patches, patches - encoder.positions(grid)[:, 1:], left)], 1)
    added: PendingResidual = None
    keys, values = [], []
    for layer in encoder.layers[:-1]:
        x, more, key, value, _ = layer(x, added)
        added = layer.pending_residual(more)
        keys.append(key)
        values.append(value)
    key, value, *_ = encoder.layers[-1].keys_values(x, added)
    keys.append(key)
    values.append(value)
    return FrameFeatures(keys, values, None, grid)


def merge(x: Tensor, content: Tensor, left: int) -> Tensor:
    """Merge x [F, N, D] to [F, left, D] by averaging tokens with similar content [F, N, D]. Means are weighted, so every token counts once.

    In every round each even token is matched with its most similar odd token, and the most similar of these pairs are merged.
    """
    width = x.shape[-1]
    sums = torch.cat([x, content, torch.ones_like(x[..., :1])], -1)
    while sums.shape[1] > left:
        n = min(sums.shape[1] - left, sums.shape[1] // 2)
        alike = F.normalize(sums[..., width:-1].detach(), dim=-1)
        best, partner = (alike[:, ::2] @ alike[:, 1::2].transpose(1, 2)).max(-1)
        order = best.argsort(dim=1, descending=True)
        even, odd = sums[:, ::2], sums[:, 1::2]
        going, staying = (even.gather(1, part[..., None].expand(-1, -1, sums.shape[-1])) for part in (order[:, :n], order[:, n:]))
        to = partner.gather(1, order[:, :n])[..., None].expand_as(going)
        sums = torch.cat([staying, odd.scatter_add(1, to, going)], 1)
    return sums[..., :width] / sums[..., -1:]


ENCODINGS: dict[str, Callable[[FoveatedVLM, Tensor], FrameFeatures]] = {
    "full": everything,
    "low_resolution": low_resolution,
    "merging": merged,
}
