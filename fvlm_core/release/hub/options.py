"""The options of one call of the processor: which frames of a video it reads, and transformers' options, of which most are refused.

Every option is either obeyed, or asks for what the processor does anyway, or raises an error; none is ignored.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fvlm_core.data.frames import FrameRule

NESTED = ("processor_kwargs", "common_kwargs", "text_kwargs", "images_kwargs", "videos_kwargs")
"""Dictionaries of options, as transformers takes them."""
OBEYED = ("fps", "num_frames", "max_frames")
SAME: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (None, True, False),
    "audio": (None,),
    "do_sample_frames": (None, True),
    "documents": (None,),
    "load_audio_from_video": (None, False),
    "max_length": (None,),
    "padding": (None, True, False, "longest"),
    "return_attention_mask": (None, True),
    "return_mm_token_type_ids": (None, False),
    "return_tensors": (None, "auto", "pt"),
    "return_token_type_ids": (None, False),
    "sanitize_control_tokens": (None, True, False),
    "tools": (None,),
    "truncation": (None, False, "do_not_truncate"),
}
"""Options of transformers, with the values that do not change the tensors."""
SIDES = ("left", "right")
DENSE_FPS = 1e6
"""More frames per second than any video has: `FrameRule` then takes exactly `max_frames`, evenly spaced."""


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video to read; None is the processor's own value."""

    fps: float | None = None
    num_frames: int | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if self.fps is not None and self.num_frames is not None:
            raise ValueError("fps and num_frames exclude each other: give one of them")
        for name in ("num_frames", "max_frames"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or value != int(value) or value < 1):
                raise ValueError(f"{name} is {value!r}: give a whole number from 1")
        if self.fps is not None and not (self.fps > 0 and math.isfinite(self.fps)):
            raise ValueError(f"fps is {self.fps!r}: give a number above 0")

    def rule(self, rule: FrameRule) -> FrameRule:
        """The frame rule of the call; `rule` is the processor's own."""
        if self.num_frames is not None:
            return replace(rule, fps=DENSE_FPS, max_frames=min(self.num_frames, self.max_frames or self.num_frames))
        return replace(rule, fps=self.fps or rule.fps, max_frames=self.max_frames or rule.max_frames)


def sampling(options: Mapping[str, Any]) -> Sampling:
    """Check the options of a call, and return which frames of a video to read.

    Raises TypeError for an unknown option, and ValueError for a value that the processor cannot obey.
    """
    flat = {name: value for name, value in options.items() if name not in NESTED}
    for name in NESTED:
        flat |= options.get(name) or {}
    for name, value in flat.items():
        if name in OBEYED:
            continue
        if name == "padding_side":
            raise TypeError("padding_side is an argument of its own, not one of processor_kwargs or text_kwargs")
        if name not in SAME:
            raise TypeError(
                f"the processor has no option {name!r}: it supports {', '.join(OBEYED)}, and of transformers' {', '.join(SAME)}"
            )
        if not isinstance(value, str | bool | None) or value not in SAME[name]:
            only = " or ".join(repr(one) for one in SAME[name])
            raise ValueError(f"{name}={value!r} is not supported, only {only}; options that are obeyed: {', '.join(OBEYED)}")
    return Sampling(**{name: flat[name] for name in OBEYED if name in flat})


def checked_side(side: str) -> bool:
    """Whether rows are padded on the left. Raises ValueError for another word than left or right."""
    if side not in SIDES:
        raise ValueError(f"padding_side is {side!r}: give left or right")
    return side == "left"
