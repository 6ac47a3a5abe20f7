"""Configuration of fVLM, a foveated vision-language model: a query reads every frame as one token (or a few)."""

import math
from dataclasses import dataclass
from typing import Any

from transformers import Dinov2Config, LlamaConfig, PretrainedConfig


class FVLMConfig(PretrainedConfig):
    """Configuration of the two backbones, and of how frames are read.

    Args:
        vision_config: `Dinov2Config` of the vision encoder, or its values.
        text_config: `LlamaConfig` of the language model, or its values.
        query: How frames are read: `deep` (in every encoder layer), `shallow` (in the last), `random` (a control) or `pooled` (a baseline).
        tokens_per_frame: Visual tokens per frame.
        fine_iterations: Fine passes in the training loss; inference makes one.
        query_temperature: Divisor of the query's attention logits (not the sampling temperature).
        visual_scale: Standard deviation of visual tokens at the start of training.
        film_head_width: Width of the FiLM head, 0 for none.
        glance: Values of `GlanceSettings` for a model that encodes frames at low resolution, and whose queries choose the patches to open.
        loss_weights: Weight of each pass in the training loss, coarse pass first.
        default_mode: Mode of calls that give none: `coarse_only`, `coarse_fine` or `autoregressive`.
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
        """The settings of the model's modules."""
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
        """The weights of the training loss."""
        coarse, *fine = self.loss_weights
        return LossSettings(coarse, fine)


@dataclass(frozen=True)
class GlanceSettings:
    """How patches are opened: the frame is encoded at `px` pixels (the glance), and its `open` likeliest patches `zoom` times finer.

    With several `levels`, opened patches are opened in turn; `zoom` may be a list with a value per level. The other settings are for
    training: `train_on` (read all or only chosen patches), `explore` (noise of the choice) and `distill` (weight of the loss on it).
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
        """The zoom of each level."""
        return [self.zoom] * self.levels if isinstance(self.zoom, int) else self.zoom

    @property
    def shrink(self) -> int:
        """Side of the frame divided by that of the glance."""
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
    """Weights of the text losses of the coarse pass and of each fine pass."""

    coarse: float
    fine: list[float]
