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
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Dinov2Config

from fvlm_core.model.linear import Linear, linear, summed
from fvlm_core.model.single_query import Ticket, attend_once, tickets

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
    tickets: list[list[Ticket]] = field(default_factory=list, kw_only=True)
    """Per layer one for each pass; none where gradients of keys and values go the usual way."""

    def select(self, frames: Tensor) -> "FrameFeatures":
        """The features of some frames; `frames` int64 [f]."""
        pick = [part.index_select(0, frames) for part in self.keys], [part.index_select(0, frames) for part in self.values]
        return FrameFeatures(*pick, None if self.patches is None else self.patches.index_select(0, frames), self.grid)

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


Added = tuple[Tensor, Tensor] | None
"""What a layer leaves to the next to be added, and by which scale; None before the first layer."""


def scaled_sum(x: Tensor, added: Added) -> Tensor:
    """Patches [F, N, D] with what the layer before adds."""
    return summed(x, None if added is None else added[0] * added[1])


class EncoderLayer(nn.Module):
    """One DINOv2 block, whose keys and values are handed out."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        width, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.heads = config.num_attention_heads
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.out = Linear(width, width)
        self.scale1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.scale2 = nn.Parameter(torch.ones(width))

    def keys_values(self, x: Tensor, added: Added = None, passes: int = 0) -> tuple[Tensor, Tensor, list[Ticket]]:
        """Keys and values [F, heads, N, head_dim] of patches [F, N, D], a sum as in `forward`, without queries; and `passes` tickets."""
        key, value = self._project(self.norm1(scaled_sum(x, added)), slice(x.shape[-1], None))
        return key, value, tickets(key, value, passes)

    def forward(
        self,
        x: Tensor,
        added: Added = None,
        context_key: Tensor | None = None,
        context_value: Tensor | None = None,
        seen: Tensor | None = None,
        passes: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Ticket]]:
        """Patches [F, N, D] one layer on and what the next layer adds to them by `scale2`, their keys and values, and `passes` tickets.

        They attend to each other, or to M context patches and each other where `seen` bool [N, M + N] says so.
        """
        x = scaled_sum(x, added)
        query, key, value = self._project(self.norm1(x), slice(None))
        if context_key is None or context_value is None:
            attended = F.scaled_dot_product_attention(query, key, value)
        else:
            around = torch.cat([context_key, key], dim=2), torch.cat([context_value, value], dim=2)
            attended = F.scaled_dot_product_attention(query, *around, attn_mask=seen)
        return *self._attended(x, attended), key, value, tickets(key, value, passes)

    def query(
        self, q: Tensor, key: Tensor, value: Tensor, temperature: float, bias: Tensor | None = None, ticket: Ticket | None = None
    ) -> Tensor:
        """Queries [F, Q, D] one layer on: they attend to the frame's keys and values, not to each other.

        `bias` [F, 1, Q, N] is added to the logits, whatever the temperature. `ticket`: of a single query's pass.
        """
        (query,) = self._project(self.norm1(q), slice(0, q.shape[-1]))
        scale = query.shape[-1] ** -0.5 / temperature
        if ticket is not None:
            return self._finish(q, attend_once(query, key, value, ticket, scale))
        return self._finish(q, F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale))

    def with_query(
        self,
        both: Tensor,
        added: Added,
        count: Sequence[int],
        keys: Tensor,
        values: Tensor,
        seen: Tensor,
        temperature: float,
        bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Rows [R * n + R, D] one layer on, and what the next layer adds by `scale2`: n patches of each of R frames, and a query each.

        Of `count` R, n. The patches' keys and values become the last n of `keys` and `values` [R, heads, N, head_dim]. They attend to what
        `seen` [n, N] does not lower, as the queries do to what `bias` [R, 1, 1, N] does not.
        """
        both = scaled_sum(both, added)
        patches, queries = self.norm1(both).tensor_split([count[0] * count[1]])
        query, key, value = self._project(patches.unflatten(0, count), slice(None))
        (reading,) = self._project(queries[:, None], slice(0, both.shape[-1]))
        keys[:, :, -count[1] :], values[:, :, -count[1] :] = key, value
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen)
        read = F.scaled_dot_product_attention(reading, keys, values, attn_mask=bias, scale=reading.shape[-1] ** -0.5 / temperature)
        return self._finished(both, torch.cat([part.transpose(1, 2).flatten(2).flatten(0, 1) for part in (attended, read)]))

    def weights(self, q: Tensor, key: Tensor, temperature: float, bias: Tensor | None = None) -> Tensor:
        """Attention weights [F, heads, Q, N] of queries [F, Q, D]."""
        return self.logits(q, key, temperature, bias).float().softmax(-1)

    def logits(self, q: Tensor, key: Tensor, temperature: float, bias: Tensor | None = None) -> Tensor:
        """What the attention weights [F, heads, Q, N] of queries [F, Q, D] are the softmax of."""
        (query,) = self._project(self.norm1(q), slice(0, q.shape[-1]))
        logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 / temperature)
        return logits if bias is None else logits + bias

    def _project(self, x: Tensor, part: slice) -> tuple[Tensor, ...]:
        """Rows `part` of the fused projection, as tensors [F, heads, N, head_dim]."""
        bias = None if self.qkv.bias is None else self.qkv.bias[part]
        projected = linear(x, self.qkv.weight[part], bias)
        return tuple(p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projected.split(x.shape[-1], dim=-1))

    def _attended(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        return self._finished(x, attended.transpose(1, 2).flatten(2))

    def _finished(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.out(attended) * self.scale1
        return x, self.fc2(F.gelu(self.fc1(self.norm2(x))))

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x, more = self._attended(x, attended)
        return scaled_sum(x, (more, self.scale2))


class Encoder(nn.Module):
    """DINOv2's weights and the two things done with them: `encode` frames, `query` what was encoded."""

    pixel_mean: Tensor
    pixel_std: Tensor
    layers: Sequence[EncoderLayer]

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        if config.use_swiglu_ffn or config.hidden_act != "gelu":
            raise ValueError("only DINOv2 with the GELU MLP (small, base, large) is supported")
        self.config = config
        self.patch_px, self.image_px = _side(config.patch_size), _side(config.image_size)
        self.patches = nn.Conv2d(3, config.hidden_size, self.patch_px, stride=self.patch_px)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + (self.image_px // self.patch_px) ** 2, config.hidden_size))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))  # pyright: ignore[reportAttributeAccessIssue]
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

    def encode(self, frames: Tensor, *, patches: bool = False, passes: int = 0) -> FrameFeatures:
        """Encode frames [F, H, W, 3] of 0..255, uint8 or float.

        `patches` also keeps the last layer's output for what does not query deeply. `passes`: how often all frames will be read with
        a single query; where it pays, they get tickets.

        Raises ValueError where a side is not a multiple of the patch size.
        """
        height, width = frames.shape[1:3]
        side = self.patch_px
        if height % side or width % side:
            raise ValueError(f"frames of {height}x{width} px are not a multiple of the patch size {side}")
        if frames.is_cuda or torch.is_grad_enabled() or len(frames) <= FRAMES_IN_CACHE:
            return self._encode(frames, patches, passes if self.has_tickets else 0)
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
        for layer, key, value, ticket in zip(self.layers, features.keys, features.values, own, strict=True):
            entering, q = q, layer.query(q, key, value, temperature, ticket=ticket)
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

    def _encode(self, frames: Tensor, patches: bool, passes: int = 0) -> FrameFeatures:
        x = self.embed(frames)
        added: Added = None
        keys, values, given = [], [], []
        for number, layer in enumerate(self.layers):
            if number == len(self.layers) - 1 and not patches:
                key, value, own = layer.keys_values(x, added, passes)
            elif self.gradient_checkpointing and torch.is_grad_enabled():
                x, more, key, value, own = checkpoint(layer, scaled_sum(x, added), passes=passes, use_reentrant=False)
                added = more, layer.scale2
            else:
                x, more, key, value, own = layer(x, added, passes=passes)
                added = more, layer.scale2
            keys.append(key)
            values.append(value)
            given.append(own)
        grid = (frames.shape[1] // self.patch_px, frames.shape[2] // self.patch_px)
        return FrameFeatures(keys, values, self.norm(scaled_sum(x, added)) if patches else None, grid, tickets=given if passes else [])

    def embed(self, frames: Tensor) -> Tensor:
        """Frames [F, H, W, 3] as what the first layer takes, [F, N, D]: the CLS token and the patches, with their positions."""
        grid = (frames.shape[1] // self.patch_px, frames.shape[2] // self.patch_px)
        pixels = (frames.permute(0, 3, 1, 2).to(self.patches.weight.dtype) - self.pixel_mean) / self.pixel_std
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1) + self.positions(grid).to(x.dtype)


def _side(px: object) -> int:
    """The side of a square given as one number or as two equal ones."""
    sides = set(px) if isinstance(px, list | tuple) else {px}
    (side,) = sides
    assert isinstance(side, int)
    return side
