"""Convert conversations with videos and pictures to the tensors that fVLM reads.

    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)

A video becomes one square frame per second (at most `max_frames`, evenly spaced where it is longer), as in training. `fps`, `num_frames`
and `max_frames` change that for one call.
"""

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from fvlm_core.data.frames import FrameRule, extract_frames
from fvlm_core.data.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, TURN_START, chat_format, encode
from fvlm_core.eval.stills import as_shown, square
from fvlm_core.release.hub.conversation import Row, lay_out, normalised, source
from fvlm_core.release.hub.options import Sampling, checked_side, sampling
from fvlm_core.release.hub.padded import NO_FRAME
from fvlm_core.release.hub.rendered import conversations, is_rendered

TIMEOUT_S = 60
"""Timeout for an address to answer."""
ROUNDING = 1e-3
"""Tolerance for values of float pictures above 1."""
CONTENTS = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<' + part['type'] + '>' }}{% endfor %}{% endif %}"
)
MESSAGE_TEMPLATE = CHAT_TEMPLATE.replace("' + message['content'] + '", "' }}" + CONTENTS + "{{ '")
"""The tokenizer's template, extended to messages of several parts. For text output only: `<video>` and `<image>` stand for frames."""


class FVLMProcessor(ProcessorMixin):
    """A tokenizer, and the rule that turns videos and pictures into frames.

    Args:
        tokenizer: The model's tokenizer.
        frame_px: Side of the square frames.
        fps: Frames read per second of video.
        max_frames: Most frames of a video; a longer one is sampled evenly.
        image_repeats: Number of frames as which a picture is shown, like a still video.
        tokens_per_frame: Visual tokens per frame, as in the model.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        frame_px: int = 224,
        fps: float = 1.0,
        max_frames: int = 64,
        image_repeats: int = 8,
        tokens_per_frame: int = 1,
        chat_template: str | None = None,
    ) -> None:
        self.frame_px, self.fps, self.max_frames = frame_px, fps, max_frames
        self.image_repeats, self.tokens_per_frame = image_repeats, tokens_per_frame
        super().__init__(tokenizer, chat_template=chat_template or MESSAGE_TEMPLATE)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that `apply_chat_template` returns."""
        return ["input_ids", "attention_mask", "frames", "frame_ids", "query_offsets"]

    def apply_chat_template(  # ty: ignore[incompatible-method-override] -- options by name only
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        padding_side: str = "left",
        **options: Any,
    ) -> Any:
        """Convert a conversation or a list of conversations to tensors; without `tokenize`, to text with `<video>` in place of frames.

        Args:
            conversation: Messages `{"role", "content"}`; contents are texts, or lists of `{"type": "text", "text": ...}`,
                `{"type": "image", ...}` and `{"type": "video", ...}` with the picture or video under `image`, `video`, `url` or `path`.
                `frames` and `square` list the accepted types. Contents keep their order: with the question before the video, the
                model can look for what is asked.
            chat_template: Another template; only for text.
            add_generation_prompt: Add the tokens that begin an answer.
            continue_final_message: Leave the last message open, so that it can be continued.
            tokenize: Return tensors instead of text.
            return_dict: Return all tensors, not only `input_ids`.
            return_assistant_tokens_mask: Add `assistant_masks`: 1 for the tokens of answers, which are the training targets.
            padding_side: `left` for generation; training may use either.
            **options: For tensors `fps`, `num_frames` (evenly spaced) and `max_frames` of each video, also in `processor_kwargs`; for
                text, those of transformers. Tensors are always PyTorch's, and padded to the longest row.

        Raises:
            ValueError: An invalid conversation, or an option that cannot be obeyed.
            TypeError: An unknown option.
        """
        one = isinstance(conversation[0], dict)
        chats = [normalised(messages) for messages in ([conversation] if one else conversation)]
        if not tokenize:
            texts = super().apply_chat_template(
                chats,
                chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **options,
            )
            return texts[0] if one else texts
        if chat_template not in (None, self.chat_template):
            raise ValueError("tensors are made with the processor's own chat template: leave chat_template out, or tokenize=False for text")
        open_ends = [continue_final_message] * len(chats)
        left, chosen = checked_side(padding_side), sampling(options)
        made = self._tensors(chats, prompt=add_generation_prompt, open_ends=open_ends, left=left, chosen=chosen)
        if not return_assistant_tokens_mask:
            del made["assistant_masks"]
        return made if return_dict else made["input_ids"]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        *,
        answers: str | list[str] | None = None,
        question_first: bool = True,
        padding_side: str = "left",
        **options: Any,
    ) -> BatchFeature:
        """Convert a question, or a list of questions with as many videos or images, to tensors.

        The text may also be a conversation that `apply_chat_template` rendered. Its control tokens are obeyed, so pass text from
        strangers to `apply_chat_template(tokenize=True)`.

        Args:
            images: A picture per question, or per `<image>` of rendered text; see `square`.
            text: The question or rendered conversation, or a list of them.
            videos: A video per question, or per `<video>` of rendered text; see `frames`.
            answers: An answer per question, for training; their tokens are the `labels`.
            question_first: Put the question before the frames, so that the model can look for what is asked. Rendered text has its order.
            padding_side: `left` for generation; training may use either.
            **options: `fps`, `num_frames` (evenly spaced) and `max_frames` of each video. Tensors are always PyTorch's.

        Raises:
            ValueError: No text, lists of different lengths, more or fewer media than placeholders in rendered text, or an option that
                cannot be obeyed.
            TypeError: An unknown option.
        """
        if not text:
            raise ValueError("give a question as text")
        one = isinstance(text, str)
        questions = [text] if isinstance(text, str) else list(text)
        left, chosen = checked_side(padding_side), sampling(options)
        if any(map(is_rendered, questions)):
            if answers is not None:
                raise ValueError("rendered text contains its answers: use apply_chat_template(return_assistant_tokens_mask=True) to train")
            rendered = conversations(questions, images=images, videos=videos)
            open_ends = [unfinished for _, unfinished in rendered]
            made = self._tensors([normalised(chat) for chat, _ in rendered], prompt=False, open_ends=open_ends, left=left, chosen=chosen)
            del made["assistant_masks"]
            return made
        columns = {"images": images, "videos": videos, "answers": answers}
        filled = {name: [None] * len(questions) if part is None else [part] if one else list(part) for name, part in columns.items()}
        for name, part in filled.items():
            if len(part) != len(questions):
                raise ValueError(f"{len(questions)} questions, but {len(part)} {name}: give one each")
        chats: list[list[dict[str, Any]]] = []
        for question, image, video, answer in zip(questions, filled["images"], filled["videos"], filled["answers"], strict=True):
            seen = [{"type": kind, kind: one} for kind, one in (("image", _single(image)), ("video", video)) if one is not None]
            asked = [{"type": "text", "text": question}]
            chats.append([{"role": "user", "content": asked + seen if question_first else seen + asked}])
            if answers is not None:
                chats[-1].append({"role": "assistant", "content": answer})
        open_ends = [False] * len(chats)
        made = self._tensors([normalised(chat) for chat in chats], prompt=answers is None, open_ends=open_ends, left=left, chosen=chosen)
        learned = made.pop("assistant_masks").bool()
        return made if answers is None else BatchFeature({**made, "labels": made["input_ids"].where(learned, -100)})

    def frames(self, video: Any, chosen: Sampling | None = None) -> np.ndarray:
        """Return the square frames of a video, uint8 [T, frame_px, frame_px, 3].

        `video`: the path or http address of a file, or its pictures, 1 / `self.fps` seconds apart: an array or tensor [T, H, W, 3] or
        [T, 3, H, W] (uint8, or floats from 0 to 1), or a list of pictures as `square` takes them. `chosen`: which frames to read instead.
        """
        rule = (chosen or Sampling()).rule(FrameRule(self.frame_px, self.fps, self.max_frames))
        if isinstance(video, str | Path):
            return extract_frames(_content(str(video)), rule).pixels
        if not len(video):
            raise ValueError("a video without pictures")
        return np.stack([self.square(video[index]) for index in rule.indices(len(video), self.fps)])

    def square(self, picture: Any) -> np.ndarray:
        """Scale the short side to `frame_px` and crop the centre: uint8 [frame_px, frame_px, 3].

        `picture`: the path or http address of a file, base64, a PIL image, or an array or tensor [H, W, 3] or [3, H, W].
        """
        if isinstance(picture, str | Path):
            picture = _picture(str(picture))
        image = as_shown(picture if isinstance(picture, Image.Image) else Image.fromarray(_pixels(picture)))
        return square(image, self.frame_px)

    def _tensors(
        self, chats: list[list[dict[str, Any]]], *, prompt: bool, open_ends: Sequence[bool], left: bool, chosen: Sampling
    ) -> BatchFeature:
        """Tensors of normalised conversations; a picture or video that occurs several times is read once. `open_ends`: per conversation."""
        kept: list[np.ndarray] = []
        places: dict[Any, list[int]] = {}

        def frames_of(part: dict[str, Any]) -> list[int]:
            shown = source(part)
            key = part["type"], shown if isinstance(shown, str) else id(shown)
            if key not in places:
                first = sum(map(len, kept))
                kept.append(self.square(shown)[None] if part["type"] == "image" else self.frames(shown, chosen))
                places[key] = list(range(first, first + len(kept[-1])))
            return places[key] * (self.image_repeats if part["type"] == "image" else 1)

        chat = chat_format(self.tokenizer)
        placeholder = self.tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        system_open = self.tokenizer.encode(f"{TURN_START}system\n", add_special_tokens=False, split_special_tokens=False)
        rows = [
            lay_out(
                messages,
                chat,
                lambda text: encode(self.tokenizer, text),
                frames_of,
                placeholder=placeholder,
                tokens_per_frame=self.tokens_per_frame,
                system_open=system_open,
                prompt=prompt,
                unfinished=unfinished,
            )
            for messages, unfinished in zip(chats, open_ends, strict=True)
        ]
        frames = np.concatenate(kept) if kept else np.zeros((0, self.frame_px, self.frame_px, 3), np.uint8)
        return BatchFeature({**_columns(rows, self.tokenizer.pad_token_id, left=left), "frames": torch.from_numpy(frames)})


def _columns(rows: list[Row], pad: int, *, left: bool) -> dict[str, Tensor]:
    """Rows as tensors [B, S], padded to the longest."""
    longest = max(len(row.ids) for row in rows)

    def column(values: list[list[int]], padding: int) -> Tensor:
        fill = [[padding] * (longest - len(row)) for row in values]
        return torch.tensor([more + row if left else row + more for row, more in zip(values, fill, strict=True)])

    return {
        "input_ids": column([row.ids for row in rows], pad),
        "attention_mask": column([[1] * len(row.ids) for row in rows], 0),
        "frame_ids": column([row.frame_ids for row in rows], NO_FRAME),
        "query_offsets": column([row.query_offsets for row in rows], 0),
        "assistant_masks": column([row.assistant for row in rows], 0),
    }


def _content(address: str) -> bytes:
    """The bytes of a file on disk or behind an http address."""
    if not address.lower().startswith(("http://", "https://")):
        return Path(address).read_bytes()
    return httpx.get(address, follow_redirects=True, timeout=TIMEOUT_S).raise_for_status().content


def _picture(address: str) -> Image.Image:
    """Open a picture from a file, an http address, or base64. Raises ValueError for other text.

    The picture keeps its bit depth; transformers' `load_image` would convert it to 8 bits.
    """
    if address.lower().startswith(("http://", "https://")) or os.path.isfile(address):
        return Image.open(io.BytesIO(_content(address)))
    try:
        return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2] if address.startswith("data:") else address)))
    except (OSError, ValueError) as error:
        raise ValueError(f"neither a picture's file, nor its http address, nor base64: {address[:80]!r}") from error


def _single(image: Any) -> Any:
    """Unwrap a picture from a list, the form that other processors expect. Raises ValueError for several pictures."""
    while isinstance(image, list | tuple):
        if len(image) != 1:
            raise ValueError(f"{len(image)} pictures for a question: for several pictures, use apply_chat_template")
        (image,) = image
    return image


def _pixels(picture: Any) -> np.ndarray:
    """Convert an array or tensor to uint8 [H, W, 3]."""
    if isinstance(picture, Tensor):
        picture = picture.detach().cpu()
        picture = picture.float() if picture.is_floating_point() else picture  # NumPy has no bfloat16
    array = np.asarray(picture)
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if np.issubdtype(array.dtype, np.floating):
        if array.max(initial=0.0) > 1 + ROUNDING:
            raise ValueError(f"a picture of floats up to {array.max():g}: give floats from 0 to 1, or uint8")
        array = (array.clip(0, 1) * 255).round()
    if array.min(initial=0) < 0 or array.max(initial=0) > 255:
        raise ValueError(f"a picture of whole numbers from {array.min():g} to {array.max():g}: give 0 to 255")
    array = array.astype(np.uint8)
    return array.squeeze(-1) if array.ndim == 3 and array.shape[-1] == 1 else array
