"""Ways to spend a frame's encoder FLOPs that `selectors` compares: which patches are opened, or what is encoded instead of a glance.

A chooser is what `FoveatedVLM.chooser` takes: log p [R, n] of R = clips x frames rows, and k, to patches [R, k]. Those that look at pixels
are made for one batch. An encoding is what stands in for `FoveatedVLM.encode`.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.foveation_world import ZOOM, at_random, oracle
from fvlm_core.data.cells_world import World
from fvlm_core.model.encoder import FrameFeatures
from fvlm_core.model.encoder_layer import Added
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.glance import Chooser, likeliest, look, shrunk, with_everything

LOW_SIDE = 4
"""Patches a side of a frame at low resolution: the square whose FLOPs are nearest to a glance of 3 x 3 with one patch opened."""


def chooser(selector: str, world: World) -> Chooser:
    """What opens patches in a batch of that world's clips; the likeliest where the selector opens none."""
    frames = torch.from_numpy(world.frames)
    if selector == "question":
        return partial(from_first_frame, frames.shape[1])
    if selector == "change":
        return partial(largest, change(frames))
    if selector == "saliency":
        return partial(largest, unexplained(frames.flatten(0, 1)))
    if selector == "oracle":
        return partial(oracle, wanted(world).flatten())
    return {"random": at_random, "centre": central}.get(selector, likeliest)


def wanted(world: World) -> Tensor:
    """The glance patches [B, T] over the cells that count."""
    return torch.from_numpy(world.path // ZOOM) @ torch.tensor([world.digits.shape[-1] // ZOOM, 1])


def largest(scores: Tensor, log_p: Tensor, k: int) -> Tensor:
    """The patches of the largest scores [R, n], whatever the query says."""
    assert scores.shape == log_p.shape
    return scores.topk(k).indices


def from_first_frame(frames: int, log_p: Tensor, k: int) -> Tensor:
    """A clip's frames all open what its first one does, whose query has read the question and no frame."""
    return log_p.unflatten(0, (-1, frames))[:, 0].topk(k).indices.repeat_interleave(frames, 0)


def central(log_p: Tensor, k: int) -> Tensor:
    """The patches nearest to the middle."""
    side = round(log_p.shape[1] ** 0.5)
    off = (torch.arange(side) - (side - 1) / 2) ** 2
    return (-(off[:, None] + off).flatten()).topk(k).indices.expand(len(log_p), -1)


def change(frames: Tensor) -> Tensor:
    """How much each glance patch differs from the frame before's [B * T, n], for frames uint8 [B, T, S, S, 3].

    Summed squared difference; a clip's first frame has none before it, and is scored by what its glance leaves unexplained.
    """
    glances = shrunk(frames.flatten(0, 1), ZOOM).unflatten(0, frames.shape[:2])
    first = unexplained(frames[:, 0])[:, None]
    later = per_patch((glances[:, 1:] - glances[:, :-1]).flatten(0, 1) ** 2, first.shape[-1])
    return torch.cat([first, later.unflatten(0, (len(frames), -1))], 1).flatten(0, 1)


def unexplained(frames: Tensor) -> Tensor:
    """Summed squared difference [F, n], under each glance patch, of frames uint8 [F, S, S, 3] from their glance, enlarged."""
    glance = shrunk(frames, ZOOM).permute(0, 3, 1, 2)
    enlarged = F.interpolate(glance, size=frames.shape[1:3], mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    side = frames.shape[1] // (14 * ZOOM)
    return per_patch((frames - enlarged) ** 2, side**2)


def per_patch(pixels: Tensor, n: int) -> Tensor:
    """Sums [F, n] over the squares of pixels [F, S, S, 3] that n glance patches cover."""
    side = round(n**0.5)
    return pixels.unflatten(1, (side, -1)).unflatten(3, (side, -1)).sum((2, 4, 5)).flatten(1)


def everything(model: FoveatedVLM, frames: Tensor) -> FrameFeatures:
    """The glance and all patches under it, weighed by p."""
    settings = model.settings.glance
    assert settings is not None
    return with_everything(model.encoder, look(model.encoder, frames, settings), settings, model.connector.scale_embeddings)


def low_resolution(model: FoveatedVLM, frames: Tensor) -> FrameFeatures:
    """Complete frames of `LOW_SIDE` patches a side."""
    side = LOW_SIDE * model.encoder.patch_px
    pixels = frames.permute(0, 3, 1, 2).float()
    small = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return model.encoder.encode(small.permute(0, 2, 3, 1))


def merged(model: FoveatedVLM, frames: Tensor) -> FrameFeatures:
    """All patches embedded, then averaged by similarity until as many are left as a glance and one opened patch are.

    The matching of Bolya et al. 2022, https://arxiv.org/abs/2210.09461, done once before the layers, and on what is in a patch, not on
    where it is: empty cells go first, which is the best that can happen to digits.
    """
    encoder = model.encoder
    grid = (frames.shape[1] // encoder.patch_px, frames.shape[2] // encoder.patch_px)
    embedded = encoder.embed(frames)
    patches = embedded[:, 1:]
    left = grid[0] * grid[1] // ZOOM**2 + ZOOM**2
    x = torch.cat([embedded[:, :1], merge(patches, patches - encoder.positions(grid)[:, 1:], left)], 1)
    added: Added = None
    keys, values = [], []
    for layer in encoder.layers[:-1]:
        x, more, key, value, _ = layer(x, added)
        added = layer.added(more)
        keys.append(key)
        values.append(value)
    key, value, *_ = encoder.layers[-1].keys_values(x, added)
    keys.append(key)
    values.append(value)
    return FrameFeatures(keys, values, None, grid)


def merge(x: Tensor, content: Tensor, left: int) -> Tensor:
    """Means [F, left, D] of x [F, N, D], of the tokens whose content [F, N, D] is alike; a mean of means counts every token once.

    In every round the even tokens each have a likeliest odd one, and of these pairs the most alike become one token.
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
