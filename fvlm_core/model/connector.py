"""The newly trained modules between the two backbones: static queries, the head that predicts queries, and the visual projection."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvlm_core.config import ModelSettings
from fvlm_core.model.encoder import FrameFeatures

RANDOM_QUERIES = 64
"""Number of distinct queries of the random-query control, chosen by a frame's token position modulo this number."""


class Connector(nn.Module):
    """`query_input_proj`, `q_static`, `q_init`, `query_head`, `visual_proj`, and modules of some variants only.

    The query of a frame is [k, D]: k tokens per frame, encoder width D. `query_input_proj` has no bias, and queries are initialised with
    standard deviation 1. With a bias or a smaller initialisation all queries attend alike, and the model does not learn where to look.
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
            # the k queries of the first frame come from the same hidden state (the question's last token) and must differ
            self.q_slot = nn.Parameter(torch.randn(k, vision_width)) if k > 1 else None
        if settings.glance is not None:
            # tells opened patches from glance patches at the same position; zero, so that DINOv2 starts out unchanged
            self.scale_embeddings = nn.Parameter(torch.zeros(settings.glance.levels, vision_width))

    def next_queries(self, hidden: Tensor) -> Tensor:
        """Predict queries [V, k, D] from the preceding hidden states [V, k, llm width]."""
        queries = self.query_head(hidden)
        return queries if self.q_slot is None else queries + self.q_slot

    def tokens(self, read: Tensor, queries: Tensor) -> Tensor:
        """Project the encoder's outputs `read` [..., D] for `queries` [..., D] to visual tokens [..., llm width]."""
        return self.visual_proj(read if self.film is None else read + self.film(read, queries))


class ShallowQuery(nn.Module):
    """A single cross-attention from queries to the last layer's patch features (ablation)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, features: FrameFeatures) -> FrameFeatures:
        """Return features with this module's keys and values of the patches instead of the encoder's."""
        assert features.patches is not None
        key, value = (self._split(part) for part in self.key_value(features.patches).chunk(2, dim=-1))
        return FrameFeatures([key], [value], None, features.grid)

    def forward(self, features: FrameFeatures, queries: Tensor, temperature: float) -> Tensor:
        """Queries [F, Q, D] -> attention output [F, Q, D] after a layer norm."""
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
    """MLP on the encoder's output, modulated by the query (FiLM: Perez et al. 2018, https://arxiv.org/abs/1709.07871).

    The prediction head of earlier reconstruction experiments, kept as an option for extra capacity. Its output is zero at initialisation.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.modulation = nn.Linear(width, 2 * hidden)
        self.outer = nn.Linear(hidden, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, read: Tensor, queries: Tensor) -> Tensor:
        """Return the correction [..., D] to add to the encoder's output `read` [..., D] for `queries` [..., D]."""
        scale, shift = self.modulation(queries).chunk(2, dim=-1)
        return self.outer(F.gelu(self.inner(read) * (1 + scale) + shift))


def _start(linear: nn.Linear, std: float) -> None:
    """Initialise `linear` so that unit-variance inputs give outputs of standard deviation `std`."""
    nn.init.normal_(linear.weight, std=std * linear.in_features**-0.5)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
