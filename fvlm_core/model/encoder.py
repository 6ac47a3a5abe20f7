"""DINOv2 that can be queried: patches are encoded once, the keys and values of every layer are kept, and queries attend to them later.

A query is an extra token that patches do not attend to. It passes through every layer (norm, query projection, attention to that layer's
patch keys and values, MLP), so a frame is encoded once and can then be queried many times. Weights are those of transformers'
`Dinov2Model`, with the query, key and value projections fused into one matrix. In the last layer, only keys and values of the patches are
computed, because only queries leave the encoder.

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
from fvlm_core.model.encoder_layer import EncoderLayer, LayerWeights, PendingResidual, scaled_sum
from fvlm_core.model.prepacked import PrepackedLinear
from fvlm_core.model.single_query import GradientFactors

if TYPE_CHECKING:
    from transformers import Dinov2Model

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
"""ImageNet mean and standard deviation, as in DINOv2's training."""
PATCHES_IN_CACHE = 2048
"""Patches encoded at a time on CPU without gradients (8 frames of 224 px), so that a layer's activations stay in the processor's cache."""

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
"""Patterns that map transformers' parameter names, before and since 5.18, to ours."""


@dataclass(frozen=True)
class FrameFeatures:
    """Encoded frames, ready to be queried: F frames with N = 1 + patches tokens each (CLS token first)."""

    keys: list[Tensor]
    """Per layer [F, heads, N, head_dim]."""
    values: list[Tensor]
    """Per layer [F, heads, N, head_dim]."""
    patches: Tensor | None
    """[F, N, D] after the final norm; None unless `encode` was called with `patches=True`."""
    grid: tuple[int, int]
    """Number of patch rows and columns."""
    factors: list[list[GradientFactors | None]] = field(default_factory=list, kw_only=True)
    """Per layer and pass (`fvlm_core.model.single_query`). Empty if autograd accumulates the gradients of keys and values."""
    weights: list[LayerWeights] | None = field(default=None, kw_only=True)
    """Cast weights that the frames were encoded with, to be used for their queries too; None for the layers' own parameters."""
    read: Tensor | None = field(default=None, kw_only=True)
    """Outputs [F, Q, D], after the final norm, of the queries given to `encode`; None without any."""

    def select(self, frames: Tensor) -> "FrameFeatures":
        """Return the features of the frames with indices `frames` int64 [f]."""
        pick = [part.index_select(0, frames) for part in self.keys], [part.index_select(0, frames) for part in self.values]
        patches = None if self.patches is None else self.patches.index_select(0, frames)
        return FrameFeatures(*pick, patches, self.grid, weights=self.weights)

    @classmethod
    def joined(cls, parts: Iterable["FrameFeatures"], n_frames: int) -> "FrameFeatures":
        """Concatenate consecutive parts, `n_frames` frames in total. Each part is freed as soon as it is copied."""
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
    """DINOv2 with two operations: `encode` frames, and `query` the encoded frames."""

    pixel_mean: Tensor
    pixel_std: Tensor
    layers: Sequence[EncoderLayer]  # an nn.ModuleList, which does not declare the type of its elements

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
        self.factored_gradients = False
        """Whether gradients of keys and values are returned as factors (`fvlm_core.model.single_query`). Only pays off in compiled code."""

    @classmethod
    def from_dinov2(cls, dinov2: "Dinov2Model") -> Self:
        """Build an encoder with the weights of a `Dinov2Model`."""
        encoder = cls(dinov2.config)
        encoder.load_state_dict(cls.from_dinov2_state(dinov2.state_dict()))
        return encoder

    @property
    def castable(self) -> bool:
        """Whether all linear layers are plain, i.e. none is replaced by an adapter."""
        return all(type(m) is PrepackedLinear for layer in self.layers for m in (layer.qkv, layer.out, layer.fc1, layer.fc2))

    def cast(self, casts: Casts) -> list[LayerWeights] | None:
        """Return the cast matrices of all layers, to be shared by all passes over the frames; None if `casts` excludes the encoder."""
        dtype = casts.dtype("encoder", self.cls_token.device)
        if dtype is None:
            return None
        return [LayerWeights(*casts(layer.matrices, dtype)) for layer in self.layers]

    @staticmethod
    def from_dinov2_state(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the state dict of a `Dinov2Model`, of any transformers release, to this encoder's names and fused projections."""
        state: dict[str, Tensor] = {}
        for name, tensor in theirs.items():
            for pattern, ours in _NAMES:
                name = re.sub(pattern, ours, name)
            state[name] = tensor
        state.pop("embeddings.mask_token", None)  # only used in masked pre-training
        for name in [name for name in state if ".qkv.q." in name]:
            parts = [state.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
            state[name.replace(".q.", ".")] = torch.cat(parts)
        return state

    def to_dinov2(self) -> "Dinov2Model":
        """Return a transformers `Dinov2Model` with the same weights. Its unused mask token is zero."""
        from transformers import Dinov2Model  # this import takes seconds, and inference does not need it

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
        """Encode frames [F, H, W, 3] with values 0..255, uint8 or float.

        `patches`: also compute the last layer's patch outputs, for variants without deep queries. `passes`: number of later passes over all
        frames with a single query each; they get gradient factors if `factored_gradients`. `queries` [F, Q, D]: queries of the first of
        these passes, if already known; they go through the layers together with the patches, in the same kernels, at temperature 1.
        `weights`: from `cast`.

        Raises ValueError if a side is not a multiple of the patch size.
        """
        height, width = frames.shape[1:3]
        side = self.patch_px
        if height % side or width % side:
            raise ValueError(f"frames of {height}x{width} px are not a multiple of the patch size {side}")
        at_a_time = max(1, PATCHES_IN_CACHE // ((height // side) * (width // side)))
        if frames.is_cuda or torch.is_grad_enabled() or len(frames) <= at_a_time:
            return self._encode(frames, patches, passes if self.factored_gradients else 0, queries, weights)
        parts = (self._encode(part, patches) for part in frames.split(at_a_time))
        return FrameFeatures.joined(parts, len(frames))

    def query(self, features: FrameFeatures, q: Tensor, temperature: float = 1.0, pass_index: int | None = None) -> tuple[Tensor, Tensor]:
        """Query the frames with q [F, Q, D]. `pass_index`: index of the pass, among the `passes` given to `encode`.

        Returns the outputs [F, Q, D] after the final norm, and the queries' inputs to the last layer [F, Q, D], detached, for `attention`.
        """
        entering = q
        own: list[GradientFactors | None] = [None] * len(self.layers)
        if features.factors and pass_index is not None and q.shape[1] == 1:
            own = [of_layer[pass_index] for of_layer in features.factors]
        weights = features.weights or [None] * len(self.layers)
        for layer, key, value, factors, cast in zip(self.layers, features.keys, features.values, own, weights, strict=True):
            entering, q = q, layer.query(q, key, value, temperature, factors=factors, weights=cast)
        return self.norm(q), entering.detach()

    @torch.no_grad()
    def attention(self, features: FrameFeatures, entering: Tensor, temperature: float = 1.0) -> Tensor:
        """Attention weights [F, heads, Q, N] of the last layer, for its inputs `entering` [F, Q, D]. Index 0 of N is the CLS token."""
        return self.layers[-1].weights(entering, features.keys[-1], temperature)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings [1, 1 + patches, D] for a grid, resampled (bicubic, fp32) if it differs from the pre-trained grid."""
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
        residual: PendingResidual = None
        n_queries = 0 if queries is None else queries.shape[1]
        later = passes - 1 if passes and n_queries else passes  # a pass that runs with the patches queries the last layer only
        keys, values = [], []
        given: list[list[GradientFactors | None]] = []
        for number, (layer, cast) in enumerate(zip(self.layers, weights or [None] * len(self.layers), strict=True)):
            how: dict[str, Any] = {"passes": later, "n_queries": n_queries, "weights": cast}
            if number == len(self.layers) - 1 and not patches:
                key, value, own, queries = layer.keys_values(x, residual, passes, n_queries, cast)
            elif self.gradient_checkpointing and torch.is_grad_enabled():
                x, more, key, value, own = checkpoint(layer, scaled_sum(x, residual), **how, use_reentrant=False)
                residual = layer.pending_residual(more, cast)
            else:
                x, more, key, value, own = layer(x, residual, **how)
                residual = layer.pending_residual(more, cast)
            keys.append(key)
            values.append(value)
            given.append([None] * (passes - len(own)) + own)
        grid = (frames.shape[1] // self.patch_px, frames.shape[2] // self.patch_px)
        read = None
        if queries is not None and n_queries:
            factors = given[-1][0] if passes and n_queries == 1 else None
            last = None if weights is None else weights[-1]
            read = self.norm(self.layers[-1].query(queries, keys[-1], values[-1], 1.0, factors=factors, weights=last))
        kept = self.norm(scaled_sum(x, residual)) if patches else None
        return FrameFeatures(keys, values, kept, grid, factors=given if passes else [], weights=weights, read=read)

    def embed(self, frames: Tensor, queries: Tensor | None = None) -> Tensor:
        """Embed frames [F, H, W, 3] as the first layer's input [F, N, D]: CLS token and patches, with position embeddings.

        If `queries` [F, Q, D] are given, they are appended: [F, N + Q, D].
        """
        grid = (frames.shape[1] // self.patch_px, frames.shape[2] // self.patch_px)
        pixels = (frames.permute(0, 3, 1, 2).to(self.patches.weight.dtype) - self.pixel_mean) / self.pixel_std
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1) + self.positions(grid).to(x.dtype)
        return x if queries is None else torch.cat([x, queries.to(x.dtype)], dim=1)


def _side(px: object) -> int:
    """Return the side of a square given as one number or as a pair of equal numbers."""
    sides = set(px) if isinstance(px, list | tuple) else {px}
    (side,) = sides
    assert isinstance(side, int)
    return side
