"""Lay out a conversation of texts, pictures and videos as one row of tokens, as in training.

Contents keep their order. A frame's query is computed from the frame before it. The query of a video's first frame is computed from the
last token before the video if the user has written text by then; otherwise it is the learned first query.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fvlm_core.data.batch import ChatFormat
from fvlm_core.release.hub.padded import NO_FRAME

Content = list[dict[str, Any]]
"""Parts of a message: `{"type": "text", "text": ...}`, `{"type": "image" | "video", <one of SOURCES>: ...}`."""
ROLES = ("system", "user", "assistant")
SOURCES = ("video", "image", "url", "path", "base64")
"""Keys of a picture or video in a message."""


@dataclass
class Row:
    """The tokens of one conversation, with the columns of each token that `packed_batch` needs."""

    ids: list[int] = field(default_factory=list)
    frame_ids: list[int] = field(default_factory=list)
    query_offsets: list[int] = field(default_factory=list)
    assistant: list[int] = field(default_factory=list)
    """1 for the tokens of an answer and the token that ends it, which are the training targets."""

    def text(self, ids: Sequence[int], *, learned: bool = False) -> None:
        """Add text tokens; `learned` marks them as training targets."""
        self.ids += ids
        self.frame_ids += [NO_FRAME] * len(ids)
        self.query_offsets += [0] * len(ids)
        self.assistant += [int(learned)] * len(ids)

    def show(self, frame_ids: Sequence[int], placeholder: int, *, tokens_per_frame: int, asked: bool) -> None:
        """Add the visual tokens of a video's frames; `asked`: user text precedes the video."""
        for number, frame in enumerate(frame_ids):
            for slot in range(tokens_per_frame):
                self.ids.append(placeholder)
                self.frame_ids.append(frame)
                self.query_offsets.append(tokens_per_frame if number else slot + 1 if asked else 0)
                self.assistant.append(0)


def normalised(conversation: Any) -> list[dict[str, Any]]:
    """Normalise messages: contents become lists of parts, and adjacent texts are joined and stripped.

    Raises ValueError for an invalid conversation.
    """
    messages = []
    for number, message in enumerate(conversation):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or (role == "system" and number):
            raise ValueError(f"message {number} has the role {role!r}: give user or assistant, and system only at the start")
        parts: Content = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
            kind = part.get("type")
            if kind == "text" and parts and parts[-1]["type"] == "text":
                parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
            elif kind == "text" or (kind in ("image", "video") and role == "user"):
                parts.append(part)
            else:
                raise ValueError(f"message {number} of the {role} has a content of type {kind!r}: text, or the user's image or video")
        parts = [{"type": "text", "text": part["text"].strip()} if part["type"] == "text" else part for part in parts]
        messages.append({"role": role, "content": parts})
    if not messages or not any(message["content"] for message in messages):
        raise ValueError("give a question: the conversation is empty")
    return messages


def source(part: dict[str, Any]) -> Any:
    """The picture or video that a part of type image or video names. Raises ValueError if it names none."""
    for key in SOURCES:
        if part.get(key) is not None:
            return part[key]
    raise ValueError(f"a content of type {part['type']!r} names no picture or video: give one of {', '.join(SOURCES)}")


def lay_out(
    messages: list[dict[str, Any]],
    chat: ChatFormat,
    encode: Callable[[str], list[int]],
    frames_of: Callable[[dict[str, Any]], list[int]],
    *,
    placeholder: int,
    tokens_per_frame: int,
    system_open: Sequence[int],
    prompt: bool,
    unfinished: bool = False,
) -> Row:
    """Lay out normalised messages as one row.

    Args:
        messages: See `normalised`.
        chat: The fixed tokens of the chat format.
        encode: Tokenizes a text.
        frames_of: Returns the frames that a part of type image or video shows, in order.
        placeholder: Token id in the place of visual tokens.
        tokens_per_frame: Visual tokens per frame.
        system_open: Tokens that open a system message given by the user.
        prompt: Add the tokens that begin an answer.
        unfinished: Leave the last message open, so that it can be continued.
    """
    row, asked = Row(), False
    if messages[0]["role"] != "system":
        row.text(chat.system)
    for number, message in enumerate(messages):
        role = message["role"]
        opens = {"system": system_open, "user": chat.user_open, "assistant": chat.assistant_open}[role]
        row.text(opens)
        for part in message["content"]:
            if part["type"] == "text":
                row.text(encode(part["text"]), learned=role == "assistant")
                asked = asked or role == "user"
            else:
                row.show(frames_of(part), placeholder, tokens_per_frame=tokens_per_frame, asked=asked)
        if unfinished and number == len(messages) - 1:
            break
        end = chat.assistant_close if role == "assistant" else chat.user_close
        row.text(end[:1], learned=role == "assistant")
        row.text(end[1:])
    if prompt:
        row.text(chat.assistant_open)
    return row
