"""A video stream: frames arrive one at a time, each is read as `tokens_per_frame` tokens, and questions can be asked at any time.

This is the autoregressive mode without an end. A frame's encoder features are dropped once the frame has been queried; only the language
model's KV cache grows, by `tokens_per_frame` per frame. When the context is full, old frames are dropped: `slide` drops the older half,
`thin` drops every second frame, so that the whole past remains, at an ever lower frame rate. Both then read the remaining tokens once
more (cheap, at one token per frame), so that positions start at zero again.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fvlm_core.data.batch import ChatFormat
from fvlm_core.eval.stills import square
from fvlm_core.model.attention import PackedCache, PackedLayout
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.inference import continue_greedily
from fvlm_core.model.long_cache import LongCache, RoundedCache

WhenFull = Literal["slide", "thin"]
FIRST_CAPACITY = 256
"""Initial capacity of the KV cache in tokens; doubled whenever it is exceeded."""


class FrameStream:
    """Reads frames as they arrive, and answers questions about them."""

    def __init__(
        self,
        model: FoveatedVLM,
        chat: ChatFormat,
        *,
        task_ids: Sequence[int] = (),
        context: int | None = None,
        reserve: int = 256,
        when_full: WhenFull = "slide",
        rounded: bool = False,
        frame_px: int | None = None,
    ) -> None:
        """Start an empty stream.

        Args:
            model: A model with the autoregressive mode.
            chat: The model's chat format.
            task_ids: Tokens of a question that is known before the first frame, and then directs the gaze.
            context: Most tokens in context; by default the language model's own limit.
            reserve: Tokens of the context that are kept free for a question and its answer.
            when_full: How frames are dropped once the context is full.
            rounded: On a CPU, keep keys and values in bfloat16. This halves their memory, and about halves the extra time that a
                frame takes after thousands of frames.
            frame_px: Side of the frames in training; by default from the model's settings. A released model needs `processor.frame_px`.

        Raises:
            ValueError: The model has no autoregressive mode or does not say `frame_px`, or the context has no room for two frames.
        """
        if "autoregressive" not in model.modes:
            raise ValueError(f"a model with query {model.settings.query!r} cannot stream")
        self.model, self.chat, self.when_full, self.rounded = model, chat, when_full, rounded
        vision = getattr(model.settings, "vision", None)
        side = frame_px if frame_px is not None or vision is None else vision.frame_px
        if side is None:
            raise ValueError("a released model does not say how large its frames are: give frame_px, as its processor has it")
        self.side: int = side
        self.k = model.settings.tokens_per_frame
        self.head = [*chat.system, *chat.user_open, *task_ids]
        self.has_task = bool(task_ids)
        self.context = context or model.llm.config.max_position_embeddings
        self.limit = self.context - reserve
        if self.limit < len(self.head) + 2 * self.k:
            raise ValueError(
                f"a context of {self.context} tokens, {reserve} of them reserved and {len(self.head)} taken by the prompt, "
                "has no room for two frames"
            )
        self.device = model.connector.visual_proj.weight.device
        self.seen = 0
        """Frames pushed so far."""
        self.tokens: list[Tensor] = []
        """Visual tokens [k, llm width] of the frames still in context."""
        self._reread()

    @property
    def length(self) -> int:
        """Tokens in context."""
        return self.cache.lengths[0]

    @torch.no_grad()
    def push(self, frame: np.ndarray | Tensor) -> None:
        """Look at the next frame, uint8 [H, W, 3]. It is scaled and centre-cropped to the model's size, as in training.

        Raises ValueError for a frame of another type or shape.
        """
        shown = self._square(frame)
        if self.length + self.k > self.limit:
            self._make_room()
        features = self.model.encode(shown[None].to(self.device))
        queries = self._queries()
        token = self.model.read(features, queries[None]).tokens[0]
        self.hidden = self._run(token)
        self.tokens.append(token)
        self.seen += 1

    @torch.no_grad()
    def ask(self, question_ids: Sequence[int], *, max_new_tokens: int = 64) -> list[int]:
        """Answer a question about the frames seen so far; returns the answer's tokens. Question and answer do not stay in the context.

        Raises ValueError if question and answer do not fit into the context.
        """
        tail = [*question_ids, *self.chat.user_close, *self.chat.assistant_open]
        before = self.length
        if before + len(tail) + max_new_tokens > self.context:
            raise ValueError(
                f"question and answer come to {len(tail) + max_new_tokens} tokens, and {before} of the context's {self.context} are taken: "
                "make the stream with a larger reserve, or ask for fewer new tokens"
            )
        self._reserve(before + len(tail) + max_new_tokens)
        hidden = self._run(self.model.embed(torch.tensor(tail, device=self.device)))
        (answer,) = continue_greedily(
            self.model, self.cache, hidden[-1:], max_new_tokens=max_new_tokens, stop_ids=self.chat.assistant_close[:1]
        )
        self.cache.lengths[0] = before
        return answer

    def _square(self, frame: np.ndarray | Tensor) -> Tensor:
        """The frame as uint8 [frame_px, frame_px, 3]."""
        pixels, side = frame.cpu().numpy() if isinstance(frame, Tensor) else np.asarray(frame), self.side
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or 0 in pixels.shape:
            raise ValueError(f"a frame of {pixels.dtype} and shape {list(pixels.shape)}: give uint8 [H, W, 3]")
        return torch.tensor(pixels if pixels.shape[:2] == (side, side) else square(Image.fromarray(pixels), side))

    def _queries(self) -> Tensor:
        """Queries [k, D] for the next frame."""
        connector = self.model.connector
        if self.model.settings.query == "random":
            return connector.random_queries[self.length % len(connector.random_queries)]
        if self.tokens:
            return connector.next_queries(self.hidden[-self.k :])
        return connector.next_queries(self.hidden[-1:].expand(self.k, -1)) if self.has_task else connector.q_init

    def _run(self, embeddings: Tensor) -> Tensor:
        """Append embeddings [n, llm width] to the context; returns their last hidden states [n, llm width]."""
        self._reserve(self.length + len(embeddings))
        positions = torch.arange(self.length, self.length + len(embeddings), device=self.device)
        return self.model.run_llm(embeddings, positions, PackedLayout([len(embeddings)], self.cache))

    def _reserve(self, tokens: int) -> None:
        if tokens > self.cache.starts[-1]:
            self.cache.grow(max(tokens, 2 * self.cache.starts[-1]))

    def _make_room(self) -> None:
        self.tokens = self.tokens[len(self.tokens) // 2 :] if self.when_full == "slide" else self.tokens[::2]
        self._reread()

    @torch.no_grad()
    def _reread(self) -> None:
        """Rebuild the KV cache from the prompt and the remaining visual tokens."""
        if self.device.type == "cpu":
            self.cache = (RoundedCache if self.rounded else LongCache)(FIRST_CAPACITY)
        else:
            self.cache = PackedCache([FIRST_CAPACITY])
        head = self.model.embed(torch.tensor(self.head, device=self.device))
        self.hidden = self._run(torch.cat([head, *self.tokens]) if self.tokens else head)
