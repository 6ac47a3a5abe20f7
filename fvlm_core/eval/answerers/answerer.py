"""The interface through which every model is asked: media are opened once, then asked any number of questions, in any condition.

A question comes with continuations whose likelihood is wanted, or asks for generated text. What one opening computes once (the encoded
frames) and what the continuations of a question share (everything before them) is the model's to keep.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from fvlm_core.data.frames import FrameRule
from fvlm_core.eval.generation import GREEDY, Generation, Method
from fvlm_core.eval.media import Media

if TYPE_CHECKING:
    import torch

Order = Literal["question_first", "question_after"]
ORDERS: tuple[Order, ...] = ("question_first", "question_after")
View = Literal["shown", "shuffled", "blind", "random_query", "question_query"]
"""What the model gets to see: the media, their frames in another order, nothing; or the media looked at with random queries, or with one
query that the question makes for all frames alike."""


@dataclass(frozen=True)
class Condition:
    """One way to ask."""

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
    """Their log-likelihoods are wanted."""
    first_token: bool = False
    """Only that of each continuation's first token: letters, which need no pass of their own."""
    max_new_tokens: int = 0
    """Generate an answer of at most so many tokens; 0 generates none."""
    generation: Generation = GREEDY
    """How."""


@dataclass(frozen=True)
class Reply:
    """What a model says to a question."""

    sums: np.ndarray
    """float64 [continuations, 3]: log-likelihood of the text's tokens, their number, log-likelihood of the end of the turn after them."""
    said: str = ""


class Opened(Protocol):
    """Media that a model has seen."""

    def replies(self, asks: Sequence[Ask], condition: Condition) -> list[Reply]:
        """Answer every question by itself."""
        ...


class Answerer(Protocol):
    """A model."""

    name: str
    checkpoint: str
    """sha256 of its weights."""
    rule: FrameRule
    image_repeats: int
    tokens_per_frame: int
    methods: tuple[Method, ...]
    """Ways to generate that it has."""

    @property
    def device(self) -> "torch.device":
        """Where it computes."""
        ...

    def conditions(self, orders: Sequence[Order], modes: Sequence[str] | None, *, controls: bool) -> list[Condition]:
        """Those that this model has: each mode in each order, and the controls. Raises UserError for a mode that it lacks."""
        ...

    def open(self, media: Media, name: str) -> Opened:
        """Look at media; `name` seeds what is random about it."""
        ...

    def unconditional(self, texts: Sequence[str]) -> list[Reply]:
        """Log-likelihood of texts as answers to nothing."""
        ...
