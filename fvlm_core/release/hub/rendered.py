"""Read text that the chat template rendered back into conversations, with the videos and pictures of its placeholders.

So `processor(text=[processor.apply_chat_template(messages)], videos=[path])`, the form that most processors of transformers expect, makes
the same tensors as `apply_chat_template(messages, tokenize=True)`.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from fvlm_core.data.tokenizer import SYSTEM_PROMPT, TURN_END, TURN_START
from fvlm_core.release.hub.conversation import ROLES

SYSTEM_OPEN = f"{TURN_START}system\n"
"""Start of every text that the template renders."""
PLACEHOLDER = re.compile("(<video>|<image>)")
FIX = "render it with this processor's apply_chat_template, or give a bare question"

Chat = tuple[list[dict[str, Any]], bool]
"""Messages, and whether the last one is left open."""


def is_rendered(text: str) -> bool:
    """Whether a text is a rendered conversation, not a bare question."""
    return text.startswith(TURN_START)


def conversations(texts: Sequence[str], *, images: Any, videos: Any) -> list[Chat]:
    """Read rendered texts; their placeholders get the pictures and videos, in order.

    `images` and `videos` hold one medium per placeholder: a list over all texts, or a list per text; a single medium needs no list.

    Raises ValueError if a text is not the template's, or if the numbers of placeholders and media differ.
    """
    chats = [_parse(text) for text in texts]
    for kind, given in (("image", images), ("video", videos)):
        slots = [[part for message in messages for part in _parts(message) if part["type"] == kind] for messages, _ in chats]
        per_text = _per_text(given, kind, len(chats))
        for number, (wanted, found) in enumerate(zip(slots, per_text, strict=True) if per_text else ()):
            _check(len(wanted), len(found), kind, f"text {number}")
        media, places = list(_media(given, kind)), [part for wanted in slots for part in wanted]
        _check(len(places), len(media), kind, "the text" if len(chats) == 1 else f"the {len(chats)} texts")
        for part, medium in zip(places, media, strict=True):
            part[kind] = medium
    return chats


def _parse(text: str) -> Chat:
    """Messages of a rendered text; its pictures and videos are not filled in yet."""
    if not text.startswith(SYSTEM_OPEN):
        raise ValueError(f"a rendered conversation begins with {SYSTEM_OPEN!r}, not {text[:40]!r}: {FIX}")
    messages, unfinished = [], False
    for turn in text.split(TURN_START)[1:]:
        role, line_end, body = turn.partition("\n")
        if role not in ROLES or not line_end or unfinished:
            raise ValueError(f"the rendered conversation breaks at {TURN_START + turn[:40]!r}: {FIX}")
        closed = body.removesuffix("\n")
        unfinished = not closed.endswith(TURN_END)
        content = body if unfinished else closed.removesuffix(TURN_END)
        pieces = [piece for piece in PLACEHOLDER.split(content) if piece] if role == "user" else [content]
        parts = [{"type": piece[1:-1]} if PLACEHOLDER.fullmatch(piece) else {"type": "text", "text": piece} for piece in pieces]
        messages.append({"role": role, "content": parts if role == "user" else content})
    if messages[0]["content"] == SYSTEM_PROMPT and len(messages) > 1:
        messages = messages[1:]  # the template's own, which is added to every conversation without a system message
    return messages, unfinished


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    return message["content"] if isinstance(message["content"], list) else []


def _per_text(given: Any, kind: str, texts: int) -> list[list[Any]] | None:
    """The media of each text if they are given as a list per text, otherwise None."""
    if not isinstance(given, list | tuple) or len(given) != texts:
        return None
    if any(one is not None and (not isinstance(one, list | tuple) or _is_one(one, kind)) for one in given):
        return None
    return [list(_media(one, kind)) for one in given]


def _media(given: Any, kind: str) -> Iterator[Any]:
    """The pictures or videos in nested lists, in order."""
    if given is None:
        return
    if _is_one(given, kind):
        yield given
    else:
        for one in given:
            yield from _media(one, kind)


def _is_one(given: Any, kind: str) -> bool:
    """Whether this is one picture or video, not a list or batch of them. A video may be a list of its pictures, but not of their paths."""
    if isinstance(given, list | tuple):
        return kind == "video" and bool(given) and _is_picture(given[0])
    return getattr(given, "ndim", 0) <= (3 if kind == "image" else 4)


def _is_picture(value: Any) -> bool:
    return isinstance(value, Image.Image) or 0 < getattr(value, "ndim", 0) <= 3


def _check(placeholders: int, media: int, kind: str, where: str) -> None:
    if placeholders != media:
        raise ValueError(
            f"{where}: {placeholders} <{kind}> in the rendered text, but {media} {kind}s given: give one per <{kind}>, in order"
        )
