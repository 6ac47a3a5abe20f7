"""DINOv2 that can be queried: patches are encoded once, each layer's keys and values are kept, queries read them later.

A query is an extra token that patches never see. It goes through every layer (its own norm, query projection, attention to
that layer's patch keys and values, MLP), so a frame can be queried many times for the price of one encode. Weights are
those of transformers' `Dinov2Model`, with query, key and value projections as one matrix; the last layer's patches are
taken no further than their keys and values, because only queries leave the encoder.

DINOv2: Oquab et al. 2023, https://arxiv.org/abs/2304.07193.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Dinov2Config

from fvlm_core.model.casts import Casts
from fvlm_core.model.encoder_layer import Added, EncoderLayer, LayerWeights, scaled_sum
from fvlm_core.model.prepacked import PrepackedLinear
from fvlm_core.model.single_query import Ticket

if TYPE_CHECKING:
    from transformers import Dinov2Model

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
"""ImageNet's, as DINOv2 was trained with."""
FRAMES_IN_CACHE = 8
"""Frames that a CPU encodes at a time without gradients: what a layer holds of them stays in the processor's cache."""

_NAMES = [
    (r"^embeddings\.patch_embeddings\.projection\.", "patches."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "position_embeddings"),
    (r"^layernorm\.", "norm."),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"layers.\1."),
    (r"\.attention\.(?:attention\.)?(?:q_proj|query)\.", ".qkv.q."),
    (r"\.attention\.(?:attention\.)?(?:k_proj|key)\.", ".qkv.k."),
    (r"\.attention\.(?:attention\.)?(?:v_proj|value)\.", ".qkv.v."),
    (r"\.attention\.(?:o_proj|output\.dense)\.", ".out."),
    (r"\.layer_scale([12])\.lambda1$", r".scale\1"),
    (r"\.mlp\.(fc[12])\.", r".\1."),
]
"""transformers' parameter names, those of 5.18 and later and those before, to ours."""


@dataclass(frozen=True)
class FrameFeatures:
    """What queries read of F frames with N = 1 + patches tokens each."""

    keys: list[Tensor]
    """Per layer [F, heads, N, head_dim]."""
    values: list[Tensor]
    """Per layer [F, heads, N, head_dim]."""
    patches: Tensor | None
    """[F, N, D] after the final norm; None where only deep queries are asked."""
    grid: tuple[int, int]
    """Patches per column and row."""
    tickets: list[list[Ticket | None]] = field(default_factory=list, kw_only=True)
    """Per layer one for each pass; none where gradients of keys and values go the usual way."""
    weights: list[LayerWeights] | None = field(default=None, kw_only=True)
    """The layers' that the frames were encoded with, for what reads them; None: the layers' own."""
    read: Tensor | None = field(default=None, kw_only=True)
    """What the queries given to `encode` read, [F, Q, D] after the final norm."""

    def select(self, frames: Tensor) -> "FrameFeatures":
        """The features of some frames; `frames` int64 [f]."""
        pick = [part.index_select(0, frames) for part in self.keys], [part.index_select(0, frames) for part in self.values]
        patches = None if self.patches is None else self.patches.index_select(0, frames)
        return FrameFeatures(*pick, patches, self.grid, weights=self.weights)

    @classmethod
    def joined(cls, parts: Iterable["FrameFeatures"], n_frames: int) -> "FrameFeatures":
        """Consecutive parts of `n_frames` frames as one; every part is let go as soon as it is copied."""
        whole, done = None, 0
        for part in parts:
            if whole is None:
                empty = [tensor.new_empty(n_frames, *tensor.shape[1:]) for tensor in part._tensors]
                layers = len(part.keys)
                whole = cls(empty[:layers], empty[layers : 2 * layers], empty[-1] if part.patches is not None else None, part.grid)
            n_new = len(part.keys[0])
            for to, tensor in zip(whole._tensors, part._tensors, strict=True):
                to[done : done + n_new] = tensor
            done += n_new
        assert whole is not None
        return whole

    @property
    def _tensors(self) -> list[Tensor]:
        return [*self.keys, *self.values, *([] if self.patches is None else [self.patches])]


class Encoder(nn.Module):
    """DINOv2's weights and the two things done with them: `encode` frames, `query` what was encoded."""

    pixel_mean: Tensor
    pixel_std: Tensor
    layers: Sequence[EncoderLayer]  # in an nn.ModuleList, whose type does not say what is in it

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        if config.use_swiglu_ffn or config.hidden_act != "gelu":
            raise ValueError("only DINOv2 with the GELU MLP (small, base, large) is supported")
        self.config = config
        self.patch_px, self.image_px = _side(config.patch_size), _side(config.image_size)
        self.patches = nn.Conv2d(3, config.hidden_size, self.patch_px, stride=self.patch_px)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + (self.image_px // self.patch_px) ** 2, config.hidden_size))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))  # ty: ignore[invalid-assignment]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1) * 255, persistent=False)
        self.gradient_checkpointing = False
        self.has_tickets = False
        """Whether gradients of keys and values are added up by tickets (`fvlm_core.model.single_query`): where all of it is compiled."""

    @classmethod
    def from_dinov2(cls, dinov2: "Dinov2Model") -> Self:
        """Take over the weights of a `Dinov2Model`."""
        encoder = cls(dinov2.config)
        encoder.load_state_dict(cls.from_dinov2_state(dinov2.state_dict()))
        return encoder

    @property
    def castable(self) -> bool:
        """Whether the layers' products are those of plain matrices: no adapters in their place."""
        return all(type(m) is PrepackedLinear for layer in self.layers for m in (layer.qkv, layer.out, layer.fc1, layer.fc2))

    def cast(self, casts: Casts) -> list[LayerWeights] | None:
        """The layers' matrices for the frames and all their passes, where they are to be cast for all of them."""
        dtype = casts.dtype("encoder", self.cls_token.device)
        if dtype is None:
            return None
        return [LayerWeights(*casts(layer.matrices, dtype)) for layer in self.layers]

    @staticmethod
    def from_dinov2_state(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict from one of a `Dinov2Model` of any transformers release."""
        state: dict[str, Tensor] = {}
        for name, tensor in theirs.items():
            for pattern, ours in _NAMES:
                name = re.sub(pattern, ours, name)
            state[name] = tensor
        state.pop("embeddings.mask_token", None)  # masked pre-training's; nothing here uses it
        for name in [name for name in state if ".qkv.q." in name]:
            parts = [state.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
            state[name.replace(".q.", ".")] = torch.cat(parts)
        return state

    def to_dinov2(self) -> "Dinov2Model":
        """The same weights as a transformers `Dinov2Model` (its unused mask token is zero)."""
        from transformers import Dinov2Model  # seconds, which a model that is only loaded and run does not need

        dinov2 = Dinov2Model(self.config)
        ours = dict(self.state_dict())
        for name in [name for name in ours if ".qkv." in name]:
            for part, tensor in zip("qkv", ours.pop(name).chunk(3), strict=True):
                ours[name.replace(".qkv.", f".qkv.{part}.")] = tensor
        state = {}
        for theirs, tensor in dinov2.state_dict().items():
            name = theirs
            for pattern, replacement in _NAMES:
                name = re.sub(pattern, replacement, name)
            state[theirs] = ours.get(name, torch.zeros_like(tensor))
        dinov2.load_state_dict(state)
        return dinov2

    def encode(
        self,
        frames: Tensor,
        *,
        patches: bool = False,
        passes: int = 0,
        queries: Tensor | None = None,
        weights: list[LayerWeights] | None = None,
    ) -> FrameFeatures:
        """Encode frames [F, H, W, 3] of 0..255, uint8 or float.

        `patches` also keeps the last layer's output for what does not query deeply. `passes`: how often all frames will be read with
        a single query; where it pays, they get tickets. `queries` [F, Q, D]: of the first of these passes, where they are known before;
        they go through the layers with the patches, in the same kernels, at a temperature of 1. `weights`: from `cast`.

        Raises ValueError where a side is not a multiple of the patch size.
        """
        height, width = frames.shape[1:3]
        side = self.patch_px
        if height % side or width % side:
            raise ValueError(f"frames of {height}x{width} px are not a multiple of the patch size {side}")
        if frames.is_cuda or torch.is_grad_enabled() or len(frames) <= FRAMES_IN_CACHE:
            return self._encode(frames, patches, passes if self.has_tickets else 0, queries, weights)
        parts = (self._encode(part, patches) for part in frames.split(FRAMES_IN_CACHE))
        return FrameFeatures.joined(parts, len(frames))

    def query(self, features: FrameFeatures, q: Tensor, temperature: float = 1.0, number: int | None = None) -> tuple[Tensor, Tensor]:
        """Read the frames with queries [F, Q, D]; `number`: which of the passes that `encode` announced.

        Returns what they read [F, Q, D] after the final norm, and the queries as they enter the last layer, of which
        `attention` makes the attention weights.
        """
        entering = q
        own: list[Ticket | None] = [None] * len(self.layers)
        if features.tickets and number is not None and q.shape[1] == 1:
            own = [of_layer[number] for of_layer in features.tickets]
        weights = features.weights or [None] * len(self.layers)
        for layer, key, value, ticket, cast in zip(self.layers, features.keys, features.values, own, weights, strict=True):
            entering, q = q, layer.query(q, key, value, temperature, ticket=ticket, weights=cast)
        return self.norm(q), entering.detach()

    @torch.no_grad()
    def attention(self, features: FrameFeatures, entering: Tensor, temperature: float = 1.0) -> Tensor:
        """The last layer's attention weights [F, heads, Q, N]; index 0 of N is the CLS token."""
        return self.layers[-1].weights(entering, features.keys[-1], temperature)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings [1, 1 + patches, D] for a grid, resampled (bicubic, fp32) where it is not the table's own."""
        table = self.position_embeddings
        own = self.image_px // self.patch_px
        if grid == (own, own):
            return table
        square = table[:, 1:].unflatten(1, (own, own)).permute(0, 3, 1, 2).float()
        resampled = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], resampled.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)

    def _encode(
        self,
        frames: Tensor,
        patches: bool,
        passes: int = 0,
        queries: Tensor | None = None,
        weights: list[LayerWeights] | None = None,
    ) -> FrameFeatures:
        x = self.embed(frames, queries)
        added: Added = None
        asking = 0 if queries is None else queries.shape[1]
        later = passes - 1 if passes and asking else passes  # of a pass that goes along only the last layer is read with a query
        keys, values = [], []
        given: list[list[Ticket | None]] = []
        for number, (layer, cast) in enumerate(zip(self.layers, weights or [None] * len(self.layers), strict=True)):
            how: dict[str, Any] = {"passes": later, "asking": asking, "weights": cast}
            if number == len(self.layers) - 1 and not patches:
                key, value, own, queries = layer.keys_values(x, added, passes, asking, cast)
            elif self.gradient_checkpointing and torch.is_grad_enabled():
                x, more, key, value, own = checkpoint(layer, scaled_sum(x, added), **how, use_reentrant=False)
                added = layer.added(more, cast)
            else:
                x, more, key, value, own = layer(x, added, **how)
                added = layer.added(more, cast)
            keys.append(key)
            values.append(value)
            given.append([None] * (passes - len(own)) + own)
        grid = (frames.shape[1] // self.patch_px, frames.shape[2] // self.patch_px)
        read = None
        if queries is not None and asking:
            ticket = given[-1][0] if passes and asking == 1 else None
            last = None if weights is None else weights[-1]
            read = self.norm(self.layers[-1].query(queries, keys[-1], values[-1], 1.0, ticket=ticket, weights=last))
        kept = self.norm(scaled_sum(x, added)) if patches else None
        return FrameFeatures(keys, values, kept, grid, tickets=given if passes else [], weights=weights, read=read)

    def embed(self, frames: Tensor, queries: Tensor | None = None) -> Tensor:
        """Frames [F, H, W, 3] as what the first layer takes, [F, N, D]: the CLS token and the patches, with their positions.

        Behind them `queries` [F, Q, D].
        """
        grid = (frames.shape[1] // self.patch_px, frames.shape[2] // self.patch_px)
        pixels = (frames.permute(0, 3, 1, 2).to(self.patches.weight.dtype) - self.pixel_mean) / self.pixel_std
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1) + self.positions(grid).to(x.dtype)
        return x if queries is None else torch.cat([x, queries.to(x.dtype)], dim=1)


def _side(px: object) -> int:
    """The side of a square given as one number or as two equal ones."""
    sides = set(px) if isinstance(px, list | tuple) else {px}
    (side,) = sides
    assert isinstance(side, int)
    return side
