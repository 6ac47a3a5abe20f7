"""The language model: Llama on packed sequences, with the weights and parameter names of transformers' `LlamaForCausalLM`.

The modules are reimplemented because transformers runs Python code between kernels (masks, caches, output capturing), which breaks compiled
graphs. Here a layer is a single graph, including attention and rotary embeddings. Checkpoints are read and written through transformers
(`from_transformers`, `to_transformers`).

Llama 2: Touvron et al. 2023, https://arxiv.org/abs/2307.09288; rotary embeddings: Su et al. 2021, https://arxiv.org/abs/2104.09864.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fvlm_core.model.attention import PackedLayout, Segments, attend, has_packed_kernel
from fvlm_core.model.casts import Casts
from fvlm_core.model.linear import Linear, joint, summed

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE scaling types that depend on the configuration alone; other types also depend on the sequence length."""


class LayerWeights(NamedTuple):
    """A layer's weight matrices, cast to the precision of its matrix products."""

    query_key_value: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


class LlamaWeights(NamedTuple):
    """All weight matrices, cast to the precision of the matrix products."""

    layers: list[LayerWeights]
    head: Tensor
    """Weight of the output layer."""


class Llama(nn.Module):
    """Embeddings, layers and output layer. Raises ValueError for another activation than SiLU or an unsupported RoPE type."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        if config.hidden_act != "silu" or _rope(config)["rope_type"] not in ROPE_TYPES:
            raise ValueError(f"only Llama with SiLU and rotary embeddings of type {', '.join(ROPE_TYPES)} is supported")
        self.config = config
        self.model = LlamaBody(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    @classmethod
    def from_transformers(cls, theirs: "LlamaForCausalLM") -> Self:
        """Build a model that shares the tensors of `theirs`."""
        with torch.device("meta"):
            llama = cls(theirs.config)
        llama.load_state_dict(theirs.state_dict(), assign=True)
        llama.tie()
        llama.model.rotary_emb.reset()
        return llama

    def to_transformers(self) -> "LlamaForCausalLM":
        """Return a transformers model with a copy of the weights."""
        from transformers import LlamaForCausalLM  # this import takes seconds, and inference does not need it

        theirs = LlamaForCausalLM(deepcopy(self.config))
        nn.Module.to(theirs, self.lm_head.weight.dtype)
        theirs.load_state_dict(self.state_dict())
        return theirs

    @property
    def castable(self) -> bool:
        """Whether all linear layers are plain and without biases, i.e. none is replaced by an adapter."""
        linears = (module for layer in self.model.layers for module in layer.modules() if isinstance(module, nn.Linear))
        return all(type(linear) is Linear and linear.bias is None for linear in linears)

    def tie(self) -> None:
        """Tie the input and output embeddings if the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def cast(self, casts: Casts) -> LlamaWeights | None:
        """Return the cast matrices, to be shared by several forward passes; None if `casts` excludes the language model."""
        dtype = casts.dtype("llm", self.lm_head.weight.device)
        if dtype is None:
            return None
        layers = [LayerWeights(*casts(layer.matrices, dtype)) for layer in self.model.layers]
        (head,) = casts([[self.lm_head.weight]], dtype)
        assert head is not None
        return LlamaWeights(layers, head)

    def forward(self, embeddings: Tensor, position_ids: Tensor, layout: PackedLayout, weights: list[LayerWeights] | None = None) -> Tensor:
        """Packed embeddings [S, D] at positions int64 [S] -> last hidden states [S, D]. New keys and values go to the layout's cache.

        `weights`: the `layers` of `cast`.
        """
        return self.model(embeddings, position_ids, layout, weights)


class LlamaBody(nn.Module):
    """Everything but the output layer."""

    layers: Sequence["LlamaLayer"]  # an nn.ModuleList, which does not declare the type of its elements

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        # no `padding_idx`: SmolLM2 pads with its end-of-turn token, and torch gives the embedding of `padding_idx` no gradient
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config, n) for n in range(config.num_hidden_layers))  # ty: ignore[invalid-assignment]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, position_ids: Tensor, layout: PackedLayout, weights: list[LayerWeights] | None = None) -> Tensor:
        """As `Llama.forward`."""
        cos, sin = self.rotary_emb(position_ids, x.dtype)
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        packed = layout.packable and has_packed_kernel(x.device, dtype, cos.shape[-1])
        segments = layout.segments(x.device) if packed else None
        added = None
        for layer, own in zip(self.layers, weights or [None] * len(self.layers), strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, added = checkpoint(layer, summed(x, added), None, cos, sin, layout, segments, own, use_reentrant=False)
            else:
                x, added = layer(x, added, cos, sin, layout, segments, own)
        return self.norm(summed(x, added))


class LlamaLayer(nn.Module):
    """Attention and MLP, each after a norm."""

    def __init__(self, config: LlamaConfig, number: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, number)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        added: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        layout: PackedLayout,
        segments: Segments | None,
        weights: LayerWeights | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Apply the layer. Return the hidden states as two terms [S, D] for the next layer to add, which saves a read if compiled.

        `added`: the second term of the previous layer, None before the first. `cos` and `sin` [S, 1, head_dim]. `segments`: arguments of
        the packed kernel; None runs SDPA.
        """
        x = summed(x, added)
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout, segments, weights)
        return x, self.mlp(self.post_attention_layernorm(x), weights)

    @property
    def matrices(self) -> list[list[Tensor]]:
        """The parameters of `LayerWeights`, grouped by input."""
        attention, mlp = self.self_attn, self.mlp
        together = [attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]
        return [[layer.weight for layer in layers] for layers in together]


class LlamaAttention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245)."""

    def __init__(self, config: LlamaConfig, number: int) -> None:
        super().__init__()
        self.number, self.head_dim = number, _head_dim(config)
        width, bias = config.hidden_size, config.attention_bias
        kv_heads = config.num_key_value_heads or config.num_attention_heads
        self.q_proj = Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = Linear(width, kv_heads * self.head_dim, bias=bias)
        self.v_proj = Linear(width, kv_heads * self.head_dim, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * self.head_dim, width, bias=bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout, segments: Segments | None, weights: LayerWeights | None = None
    ) -> Tensor:
        """[S, D] -> [S, D]."""
        projected = joint(x, (self.q_proj, self.k_proj, self.v_proj), None if weights is None else weights.query_key_value)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in projected)
        # rotate in fp32, which is exact enough for any position; attention then runs in the precision of the projections
        query, key = (_rotate(part, cos, sin).to(value.dtype) for part in (query, key))
        attended = attend(query, key, value, layout, segments, layer=self.number).flatten(1)
        return self.o_proj(attended) if weights is None else F.linear(attended, weights.out)


class LlamaMLP(nn.Module):
    """SwiGLU MLP (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, hidden, bias=bias)
        self.up_proj = Linear(width, hidden, bias=bias)
        self.down_proj = Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor, weights: LayerWeights | None = None) -> Tensor:
        """[S, D] -> [S, D]."""
        gate, up = joint(x, (self.gate_proj, self.up_proj), None if weights is None else weights.gate_up)
        gated = F.silu(gate) * up
        return self.down_proj(gated) if weights is None else F.linear(gated, weights.down)


class RMSNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], in the input's precision."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary angles."""

    inv_freq: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config, self.scale = config, 1.0
        self.register_buffer("inv_freq", torch.empty(_head_dim(config) // 2), persistent=False)
        if not self.inv_freq.is_meta:
            self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Compute the frequencies from the configuration; checkpoints do not store them."""
        kind, dim = _rope(self.config)["rope_type"], _head_dim(self.config)
        with torch.device("cpu"):
            if kind == "default":
                frequencies = 1.0 / (_rope(self.config)["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
            else:
                frequencies, self.scale = ROPE_INIT_FUNCTIONS[kind](self.config, device=torch.device("cpu"))
        self.inv_freq = frequencies if self.inv_freq.is_meta else frequencies.to(self.inv_freq.device)

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions int64 [S] -> cosines and sines [S, 1, head_dim], computed in fp32."""
        angles = (position_ids[:, None].float() * self.inv_freq.float()).repeat(1, 2)[:, None]
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [S, heads, head_dim] by the angles of `cos`, `sin` [S, 1, head_dim]; coordinates i and i + head_dim / 2 form a plane."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _rope(config: LlamaConfig) -> dict[str, Any]:
    return dict(config.rope_parameters or {})


def _head_dim(config: LlamaConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
