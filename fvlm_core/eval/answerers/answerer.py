"""The interface of all evaluated models: media are opened once, then asked any number of questions under any condition.

A question either lists continuations to score by likelihood, or asks for generated text. The implementation caches the encoded frames
of opened media, and the prefix that the continuations of a question share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from fvlm_core.data.frames import FrameRule
from fvlm_core.eval.generation import GREEDY, Generation, Method
from fvlm_core.eval.media import Media, Source

if TYPE_CHECKING:
    import torch

Order = Literal["question_first", "question_after"]
ORDERS: tuple[Order, ...] = ("question_first", "question_after")
View = Literal["shown", "shuffled", "blind", "random_query", "question_query"]
"""What the model sees: the media; their frames in another order; nothing; the media read with random queries; or the media read with a
single query, made from the question, for all frames."""


@dataclass(frozen=True)
class Condition:
    """A condition under which questions are asked."""

    mode: str
    order: Order = "question_first"
    view: View = "shown"

    @property
    def name(self) -> str:
        """Key in records and results: `question_first/coarse_fine`, `shuffled/coarse_fine`, `blind`, `random_query`, `question_query`."""
        if self.view == "shown":
            return f"{self.order}/{self.mode}"
        return f"shuffled/{self.mode}" if self.view == "shuffled" else self.view


@dataclass(frozen=True)
class Ask:
    """One question."""

    text: str
    continuations: tuple[str, ...] = ()
    """Answers to score by log-likelihood."""
    first_token: bool = False
    """Score only the first token of each continuation; for letters, which then need no forward pass of their own."""
    max_new_tokens: int = 0
    """Maximum number of tokens of a generated answer; 0 generates none."""
    generation: Generation = GREEDY
    """How the answer is generated."""


@dataclass(frozen=True)
class Reply:
    """A model's reply to one question."""

    sums: np.ndarray
    """float64 [continuations, 3]: log-likelihood of the tokens, number of tokens, log-likelihood of the end-of-turn token after them."""
    said: str = ""
    """The generated answer."""


def orders_of(native: Order) -> list[Order]:
    """Both question orders, a model's native one first."""
    return sorted(ORDERS, key=lambda order: order != native)


class Opened(Protocol):
    """Media opened by a model."""

    def replies(self, asks: Sequence[Ask], condition: Condition) -> list[Reply]:
        """Answer each question independently."""
        ...


class Answerer(Protocol):
    """A model that answers questions about media."""

    name: str
    checkpoint: str
    """sha256 of the weights."""
    rule: FrameRule
    image_repeats: int
    tokens_per_frame: int
    methods: tuple[Method, ...]
    """Supported generation methods."""
    native_order: Order
    """The question order that the model is made for."""

    @property
    def device(self) -> "torch.device":
        """The model's device."""
        ...

    def conditions(self, orders: Sequence[Order], modes: Sequence[str] | None, *, controls: bool) -> list[Condition]:
        """The conditions that this model supports: each mode in each order, and the controls in the first order.

        Raises UserError for an unsupported mode.
        """
        ...

    def load_media(self, source: Source) -> Media:
        """Decode media as the model is shown them. Raises ClipError with a user-readable reason."""
        ...

    def open(self, media: Media, name: str) -> Opened:
        """Open media; `name` seeds the random choices of the controls."""
        ...

    def unconditional(self, texts: Sequence[str]) -> list[Reply]:
        """Score texts as answers without media and without a question."""
        ...
