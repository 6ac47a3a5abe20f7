"""The body of `POST /v1/chat/completions`: OpenAI's format extended by videos, and its translation into model inputs.

https://platform.openai.com/docs/api-reference/chat. Extensions: content parts of type `video_url`, and the fields `mode`, `question_first`
and `gaze`. An unsupported option that would change the answer is rejected, not ignored, and so is a misspelt field; other unknown fields
are ignored, for example those that only concern OpenAI's service (`user`, `metadata`, `store`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from http import HTTPStatus
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fvlm_core.data.batch import ChatFormat, Sample, Turn
from fvlm_core.data.tokenizer import TURN_END, TURN_START
from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
from fvlm_core.serve.batched_decoding import MAX_NEW_TOKENS, Sampling
from fvlm_core.serve.decode import Kind
from fvlm_core.serve.limits import Limits, RequestRejectedError

MAX_STOPS = 4
GREEDY_BELOW = 1e-4
"""Lower temperatures are treated as 0: logits divided by them can overflow, and the likeliest token is almost certain anyway."""
CHARACTERS_PER_TOKEN = 32
"""An upper bound on any text's average, to reject texts that are too long before they are tokenized."""
URLS: dict[str, Kind] = {"video_url": "video", "image_url": "image"}


class Part(BaseModel):
    """A content part: text, a video or an image."""

    type: Literal["text", "video_url", "image_url"]
    text: str = ""
    video_url: "Url | str | None" = None
    image_url: "Url | str | None" = None

    @property
    def url(self) -> str | None:
        """The address of a video or image; None for text."""
        given = self.video_url if self.type == "video_url" else self.image_url if self.type == "image_url" else None
        return given.url if isinstance(given, Url) else given


class Url(BaseModel):
    """An address: `data:`, https or http."""

    url: str


class Message(BaseModel):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None

    @property
    def parts(self) -> list[Part]:
        if isinstance(self.content, str):
            return [Part(type="text", text=self.content)]
        return self.content or []

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.parts if part.type == "text").strip()


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """The request's body."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    """0, the default, is greedy decoding; so is any value below `GREEDY_BELOW`."""
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=-(2**63), lt=2**64)
    """The range that `torch.Generator.manual_seed` accepts."""
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    mode: str | None = None
    """`coarse_only`, `coarse_fine` or `autoregressive`."""
    question_first: bool | None = None
    """Whether the question comes before the video; by default the order of the parts in the first message."""
    gaze: bool = False
    """Return the frames and where the model looks in them."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


NEUTRAL: tuple[Any, ...] = (None, False, 0, [], {}, {"type": "text"})
UNSUPPORTED = {
    **dict.fromkeys(("tools", "functions", "logprobs", "top_logprobs", "response_format", "logit_bias", "audio", "prediction"), NEUTRAL),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p"), (None, 0)),
    "top_k": (None, 0, -1),
    "repetition_penalty": (None, 1),
}
"""Unsupported options, and the values of each that leave it off."""
SIMILAR = 0.85
"""Unknown fields at least this similar to one of ours are taken for misspelt (ratio of `difflib`)."""


@dataclass(frozen=True)
class ModelInput:
    """A request, translated into model inputs."""

    sample: Sample
    chat: ChatFormat
    sampling: Sampling


def to_model_input(
    request: ChatRequest, answerer: FoveatedAnswerer, limits: Limits, frames_of: Callable[[str, Kind], np.ndarray]
) -> ModelInput:
    """Translate a request into model inputs; `frames_of(address, kind)` loads media. Raises RequestRejectedError for an invalid request."""
    for name, neutral in UNSUPPORTED.items():
        if (request.model_extra or {}).get(name) not in neutral:
            raise RequestRejectedError(f"{name} is not supported")
    for name in request.model_extra or {}:
        if name not in UNSUPPORTED and (meant := get_close_matches(name.lower(), ChatRequest.model_fields, 1, SIMILAR)):
            raise RequestRejectedError(f"there is no field {name!r}; do you mean {meant[0]!r}?")
    if len(request.stops) > MAX_STOPS or any(not stop for stop in request.stops):
        raise RequestRejectedError(f"stop must be at most {MAX_STOPS} texts that are not empty")
    system = "\n".join(message.text for message in request.messages if message.role in ("system", "developer"))
    messages = [message for message in request.messages if message.role in ("user", "assistant")]
    if [message.role for message in messages] != (["user", "assistant"] * len(messages))[: len(messages)] or len(messages) % 2 == 0:
        raise RequestRejectedError("messages must alternate between user and assistant, and begin and end with user")
    if any(part.type != "text" for message in messages[1:] for part in message.parts):
        raise RequestRejectedError(
            "videos and images belong into the first user message: the model sees them before the conversation goes on"
        )
    addressed = [part for part in messages[0].parts if part.type != "text"]
    if len(addressed) > limits.media:
        raise RequestRejectedError(f"{len(addressed)} videos and images; this server takes {limits.media} in a request")
    texts = [message.text for message in messages]
    if any(not text for message, text in zip(messages, texts, strict=True) if message.role == "user"):
        raise RequestRejectedError("a user message has no text")
    _check_length(sum(map(len, [system, *texts])) // CHARACTERS_PER_TOKEN, answerer)  # a cheap bound, before tokenizing
    encode, chat = answerer.subject.encode, answerer.subject.chat
    turns = [Turn(encode(user), encode(answer)) for user, answer in zip(texts[::2], [*texts[1::2], ""], strict=True)]
    if system:
        tokenizer = answerer.subject.tokenizer
        opened = tokenizer.encode(f"{TURN_START}system\n", add_special_tokens=False, split_special_tokens=False)
        closed = tokenizer.encode(f"{TURN_END}\n", add_special_tokens=False, split_special_tokens=False)
        chat = replace(chat, system=[*opened, *encode(system), *closed])
    sampling = Sampling(
        request.max_completion_tokens or request.max_tokens or min(MAX_NEW_TOKENS, limits.new_tokens),
        request.temperature if request.temperature >= GREEDY_BELOW else 0.0,
        request.top_p,
        request.seed,
    )
    if sampling.max_new_tokens > limits.new_tokens:
        raise RequestRejectedError(f"an answer of {sampling.max_new_tokens} tokens; this server gives at most {limits.new_tokens}")
    around = len(chat.user_open) + len(chat.user_close) + len(chat.assistant_open)
    text_tokens = len(chat.system) + sum(around + len(turn.question_ids) + len(turn.answer_ids) for turn in turns)
    text_tokens += len(chat.assistant_close) * sum(bool(turn.answer_ids) for turn in turns)  # the new answer is not closed yet
    _check_length(text_tokens + sampling.max_new_tokens, answerer)
    loaded = [frames_of(_address(part), URLS[part.type]) for part in addressed]
    if (distinct := sum(map(len, loaded))) > limits.frames_at_once:
        raise RequestRejectedError(f"videos and images of {distinct} frames; this server takes {limits.frames_at_once} in a request")
    frames, media = _joined(loaded, [URLS[part.type] for part in addressed], answerer.image_repeats)
    shown = sum(map(len, media)) * answerer.tokens_per_frame
    _check_length(text_tokens + sampling.max_new_tokens + shown, answerer)
    first = request.question_first
    if first is None:
        order = [part.type == "text" for part in messages[0].parts]
        first = bool(order) and order[0]
    return ModelInput(Sample("", "", frames, media, turns, question_first=first and bool(media)), chat, sampling)


def _address(part: Part) -> str:
    if not part.url:
        raise RequestRejectedError(f"a part of type {part.type} has no address: {{'type': '{part.type}', '{part.type}': {{'url': ...}}}}")
    return part.url


def _joined(loaded: list[np.ndarray], kinds: list[Kind], image_repeats: int) -> tuple[np.ndarray, list[list[int]]]:
    """Concatenate frames, and list which of them each medium shows. A single array is shared, not copied."""
    media, start = [], 0
    for frames, kind in zip(loaded, kinds, strict=True):
        media.append([start] * image_repeats if kind == "image" else list(range(start, start + len(frames))))
        start += len(frames)
    if not loaded:
        return np.zeros((0, 1, 1, 3), np.uint8), []
    return loaded[0] if len(loaded) == 1 else np.concatenate(loaded), media


def _check_length(tokens: int, answerer: FoveatedAnswerer) -> None:
    context = answerer.subject.model.llm.config.max_position_embeddings
    if tokens > context:
        what = f"messages and answer need {tokens} tokens; the model's context has {context}"
        raise RequestRejectedError(what, HTTPStatus.BAD_REQUEST, code="context_length_exceeded")
