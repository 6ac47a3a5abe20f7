"""Multiple choice at DINOv2-small + SmolLM2-135M: one video, one question with four options, three modes.

Compares the cost of scoring all options in all modes when the video is encoded once and the question is read once per mode with one pass
per option and mode. The latter is what the original implementation and harnesses of independent requests do.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.report import Measurement, arguments, peak_memory_gb, show, side_by_side
from benchmarks.shapes import FRAME_PX, VOCABULARY, model_settings
from fvlm_core.data.batch import ChatFormat
from fvlm_core.data.frames import FrameRule
from fvlm_core.eval.answerers.answerer import Ask
from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
from fvlm_core.eval.media import Media
from fvlm_core.eval.subject import Subject
from fvlm_core.model.build import build_model
from fvlm_core.model.flop_counter import count_flops

QUESTION, OPTION, OPTIONS = 32, 8, 4
"""Tokens of the question and of an option, and the number of options."""


class Tokens(Subject):
    """A subject whose text is space-separated token ids, because a model with random weights has no tokenizer."""

    def encode(self, text: str) -> list[int]:
        """The numbers as token ids."""
        return [int(word) for word in text.split()]


def main() -> None:
    options = arguments(__doc__ or "", frames={"type": int, "default": 8}, rounds={"type": int, "default": 0, "help": "0: no timing"})
    show(measure(options.frames, options.rounds), as_json=options.json)


def measure(frames: int, rounds: int) -> Iterator[Measurement]:
    """Yield FLOPs and, if `rounds` is above 0, seconds and peak memory."""
    model = build_model(model_settings(), vocab_size=VOCABULARY).eval().requires_grad_(False)
    chat = ChatFormat(system=[1], user_open=[1], user_close=[2], assistant_open=[1], assistant_close=[2])
    tokenizer: Any = None  # `encode` needs none
    subject = Tokens(model, tokenizer, chat, torch.device("cpu"), 64)
    answerer = FoveatedAnswerer(subject, "random", "", FrameRule(FRAME_PX))
    rng = np.random.default_rng(0)
    media = Media(rng.integers(0, 256, (frames, FRAME_PX, FRAME_PX, 3), dtype=np.uint8), [list(range(frames))])
    text = partial(_text, rng)
    ask = Ask(text(QUESTION), tuple(text(OPTION) for _ in range(OPTIONS)))
    ways = {"shared": partial(shared, answerer, media, ask), "apart": partial(apart, answerer, media, ask)}
    gflop = {name: count_flops(way) / 1e9 for name, way in ways.items()}
    against = f"one pass per option and mode: {gflop['apart']:,.0f} GFLOP, {frames} frames"
    yield Measurement("evaluation", "mcq_work_saving", gflop["shared"], "GFLOP", against, gflop["apart"] / gflop["shared"])
    if rounds:
        seconds = side_by_side(ways, rounds=rounds)
        against = f"one pass per option and mode: {seconds['apart']:,.1f} s"
        yield Measurement("evaluation", "mcq_seconds_saving", seconds["shared"], "s", against, seconds["apart"] / seconds["shared"])
        memory = {name: peak_memory_gb(way) for name, way in ways.items()}
        against = f"one pass per option and mode: {memory['apart']:,.2f} GB"
        yield Measurement("evaluation", "mcq_peak_memory", memory["shared"], "GB", against, memory["shared"] / memory["apart"])


def shared(answerer: FoveatedAnswerer, media: Media, ask: Ask) -> None:
    """Score all options together, as the evaluation does."""
    opened = answerer.open(media, "video")
    for condition in answerer.conditions(["question_first"], None, controls=False):
        opened.replies([ask], condition)


def apart(answerer: FoveatedAnswerer, media: Media, ask: Ask) -> None:
    """Score every option in every mode in a pass of its own."""
    for condition in answerer.conditions(["question_first"], None, controls=False):
        for option in ask.continuations:
            answerer.open(media, "video").replies([Ask(ask.text, (option,))], condition)


def _text(rng: np.random.Generator, tokens: int) -> str:
    return " ".join(str(token) for token in rng.integers(10, VOCABULARY, tokens))


if __name__ == "__main__":
    main()
