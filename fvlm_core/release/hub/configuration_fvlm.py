"""Configuration of fVLM, a foveated vision-language model: every frame is read with a query, as one token (or a few)."""

import math
from dataclasses import dataclass
from typing import Any

from transformers import Dinov2Config, LlamaConfig, PretrainedConfig


class FVLMConfig(PretrainedConfig):
    """Shapes of the two backbones, and how frames are read.

    Args:
        vision_config: Values of the DINOv2 encoder's `Dinov2Config`.
        text_config: Values of the language model's `LlamaConfig`.
        query: How frames are read: `deep` (in every encoder layer), `shallow` (in the last), `random` (a control) or `pooled` (a baseline).
        tokens_per_frame: Visual tokens of a frame.
        fine_iterations: Fine passes of the training loss; inference makes one.
        query_temperature: Divides the query's attention logits (plain `temperature` would be a setting of sampling).
        visual_scale: Standard deviation of visual tokens at the start of training.
        film_head_width: Width of the FiLM head, 0 for none.
        glance: Values of `GlanceSettings`, where frames are encoded small and a query chooses which of their patches are opened.
        loss_weights: Weight of every pass in the training loss, coarse first.
        default_mode: `coarse_only`, `coarse_fine` or `autoregressive`, where a call does not say.
    """

    model_type = "fvlm"
    sub_configs = {"vision_config": Dinov2Config, "text_config": LlamaConfig}

    def __init__(
        self,
        vision_config: dict[str, Any] | Dinov2Config | None = None,
        text_config: dict[str, Any] | LlamaConfig | None = None,
        query: str = "deep",
        tokens_per_frame: int = 1,
        fine_iterations: int = 2,
        query_temperature: float = 1.0,
        visual_scale: float = 0.14,
        film_head_width: int = 0,
        glance: dict[str, Any] | None = None,
        loss_weights: list[float] | None = None,
        default_mode: str = "coarse_fine",
        **kwargs: Any,
    ) -> None:
        self.vision_config = vision_config if isinstance(vision_config, Dinov2Config) else Dinov2Config(**(vision_config or {}))
        self.text_config = text_config if isinstance(text_config, LlamaConfig) else LlamaConfig(**(text_config or {}))
        self.query = query
        self.tokens_per_frame = tokens_per_frame
        self.fine_iterations = fine_iterations
        self.query_temperature = query_temperature
        self.visual_scale = visual_scale
        self.film_head_width = film_head_width
        self.glance = glance
        self.loss_weights = [1.0] * (1 + fine_iterations) if loss_weights is None else loss_weights
        self.default_mode = default_mode
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @property
    def model_settings(self) -> "ModelSettings":
        """How frames are read, as the model's modules take it."""
        return ModelSettings(
            query=self.query,
            tokens_per_frame=self.tokens_per_frame,
            fine_iterations=self.fine_iterations,
            temperature=self.query_temperature,
            visual_scale=self.visual_scale,
            film_head_width=self.film_head_width,
            glance=None if self.glance is None else GlanceSettings(**self.glance),
        )

    @property
    def loss_settings(self) -> "LossSettings":
        """The training loss's weights."""
        coarse, *fine = self.loss_weights
        return LossSettings(coarse, fine)


@dataclass(frozen=True)
class GlanceSettings:
    """How frames are opened: a glance of `px`, whose likeliest `open` patches are opened, `zoom` times finer (a list: level by level).

    The others are of training: whether it reads every patch or chosen ones, the noise of its choice, and the weight of what teaches it.
    """

    px: int
    zoom: int | list[int]
    levels: int
    open: int
    train_on: str
    explore: float
    distill: float

    @property
    def zooms(self) -> list[int]:
        """The zoom of every level."""
        return [self.zoom] * self.levels if isinstance(self.zoom, int) else self.zoom

    @property
    def shrink(self) -> int:
        """Sides of the frame over those of the glance."""
        return math.prod(self.zooms)


@dataclass(frozen=True)
class ModelSettings:
    """How frames are read; see `FVLMConfig`."""

    query: str
    tokens_per_frame: int
    fine_iterations: int
    temperature: float
    visual_scale: float
    film_head_width: int
    glance: GlanceSettings | None


@dataclass(frozen=True)
class LossSettings:
    """Weights of the passes' text losses."""

    coarse: float
    fine: list[float]
