"""Everything between the two backbones, all of it new: queries, how they are made, how what they read becomes a token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvlm_core.config import ModelSettings
from fvlm_core.model.encoder import FrameFeatures

RANDOM_QUERIES = 64
"""Distinct queries of the random-query control: one per position of a frame in its sequence, repeating."""


class Connector(nn.Module):
    """`query_input_proj`, `q_static`, `q_init`, `query_head`, `visual_proj`, and the parts only some variants have.

    A query is [k, D] for the k tokens of a frame, D the encoder's width. The projection has no bias and queries start at
    standard deviation 1: with a bias or a small start all queries attend alike, and nothing is learned from gazing.
    """

    def __init__(self, settings: ModelSettings, vision_width: int, vision_heads: int, llm_width: int) -> None:
        super().__init__()
        k = settings.tokens_per_frame
        self.kind, self.temperature = settings.query, settings.temperature
        self.visual_proj = nn.Linear(vision_width, llm_width)
        _start(self.visual_proj, settings.visual_scale)
        self.film = FilmHead(vision_width, settings.film_head_width) if settings.film_head_width else None
        self.shallow = ShallowQuery(vision_width, vision_heads) if settings.query == "shallow" else None
        if settings.query == "pooled":
            return
        self.query_input_proj = nn.Linear(vision_width, vision_width, bias=False)
        _start(self.query_input_proj, 1.0)
        self.q_static = nn.Parameter(torch.randn(k, vision_width))
        self.q_init = nn.Parameter(torch.randn(k, vision_width))
        if settings.query == "random":
            self.random_queries = nn.Buffer(torch.randn(RANDOM_QUERIES, k, vision_width))
        else:
            self.query_head = nn.Linear(llm_width, vision_width)
            _start(self.query_head, 1.0)
            # k queries of one hidden state (the question's last) must differ; with one there is nothing to tell apart
            self.q_slot = nn.Parameter(torch.randn(k, vision_width)) if k > 1 else None
        if settings.glance is not None:
            # tells opened patches from the glance's, whose positions they share; zero, so that DINOv2 starts as it is
            self.scale_embeddings = nn.Parameter(torch.zeros(settings.glance.levels, vision_width))

    def next_queries(self, hidden: Tensor) -> Tensor:
        """Queries [V, k, D] of the hidden states [V, k, llm width] before them."""
        queries = self.query_head(hidden)
        return queries if self.q_slot is None else queries + self.q_slot

    def tokens(self, read: Tensor, queries: Tensor) -> Tensor:
        """Visual tokens [..., llm width] of what queries [..., D] read [..., D]."""
        return self.visual_proj(read if self.film is None else read + self.film(read, queries))


class ShallowQuery(nn.Module):
    """One cross-attention from queries to the last layer's patch features (ablation)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, features: FrameFeatures) -> FrameFeatures:
        """The features with this attention's keys and values of the patches in place of the encoder's own."""
        assert features.patches is not None
        key, value = (self._split(part) for part in self.key_value(features.patches).chunk(2, dim=-1))
        return FrameFeatures([key], [value], None, features.grid)

    def forward(self, features: FrameFeatures, queries: Tensor, temperature: float) -> Tensor:
        """Queries [F, Q, D] -> what they read [F, Q, D], normalised."""
        (key,), (value,) = features.keys, features.values
        query = self._split(queries)
        scale = query.shape[-1] ** -0.5 / temperature
        read = F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)
        return F.layer_norm(self.out(read), read.shape[-1:])

    @torch.no_grad()
    def attention(self, features: FrameFeatures, queries: Tensor, temperature: float) -> Tensor:
        """Attention weights [F, heads, Q, N] of queries [F, Q, D]."""
        query = self._split(queries)
        return (query @ features.keys[0].transpose(-1, -2) * (query.shape[-1] ** -0.5 / temperature)).float().softmax(-1)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FilmHead(nn.Module):
    """Prediction head of the earlier reconstruction experiments, as extra capacity: an MLP on what was read, modulated by
    the query (FiLM: Perez et al. 2018, https://arxiv.org/abs/1709.07871). Starts as zero, so it adds nothing at first."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.modulation = nn.Linear(width, 2 * hidden)
        self.outer = nn.Linear(hidden, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, read: Tensor, queries: Tensor) -> Tensor:
        """Correction [..., D] of what was read [..., D] with queries [..., D]."""
        scale, shift = self.modulation(queries).chunk(2, dim=-1)
        return self.outer(F.gelu(self.inner(read) * (1 + scale) + shift))


def _start(linear: nn.Linear, std: float) -> None:
    """Unit-variance input gives output of standard deviation `std`."""
    nn.init.normal_(linear.weight, std=std * linear.in_features**-0.5)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
