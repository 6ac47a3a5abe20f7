"""Continuous batching (Yu et al. 2022, https://www.usenix.org/conference/osdi22/presentation/yu): decode many answers at once.

Each step computes one token of every answer in one packed forward pass, so the language model's weights are read once for all of them.
New answers can join at any step, and the values of a row do not depend on the other rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fvlm_core.data.batch import ChatFormat, PackedBatch, Sample, pack
from fvlm_core.eval.subject import Subject
from fvlm_core.model.attention import PackedCache, PackedLayout
from fvlm_core.model.decoding import joined, nucleus
from fvlm_core.model.encoder import FrameFeatures
from fvlm_core.model.inference import over_patches, read_batch
from fvlm_core.model.names import Mode

MAX_NEW_TOKENS = 128
REPLACEMENT = "\ufffd"
"""Tokenizers decode an incomplete multi-byte character to this character."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters; temperature 0 is greedy decoding."""

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Answer:
    """An answer that is being generated."""

    sampling: Sampling
    stop_ids: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    finished: Literal["", "stop", "length"] = ""
    """Why generation ended; empty while it continues."""

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.sampling.seed)

    def choose(self, logits: Tensor) -> None:
        """Choose the next token from logits [vocabulary]; a stop token, or reaching `max_new_tokens`, finishes the answer."""
        if self.sampling.temperature > 0:
            probabilities = (logits.float() / self.sampling.temperature).softmax(-1)[None]
            token = int(torch.multinomial(nucleus(probabilities, self.sampling.top_p)[0].cpu(), 1, generator=self.generator))
        else:
            token = int(logits.argmax())
        if token in self.stop_ids:
            self.finished = "stop"
            return
        self.tokens.append(token)
        if len(self.tokens) >= self.sampling.max_new_tokens:
            self.finished = "length"


class DecodingBatch:
    """A batch of answers in progress that share one KV cache."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.rows: list[Answer] = []
        self.cache = PackedCache([])
        self.hidden = torch.zeros(0)

    @torch.inference_mode()
    def add(self, answers: Sequence[Answer], cache: PackedCache, hidden: Tensor) -> None:
        """Add answers to the sequences of `cache`, whose last hidden states are `hidden` [n, llm width], and choose their first tokens.

        The keys and values are copied: `cache` itself does not change.
        """
        self._choose(answers, hidden)
        going = [row for row, answer in enumerate(answers) if not answer.finished]
        parts = [(self.cache, row) for row in range(len(self.rows))] + [(cache, row) for row in going]
        self.rows = [*self.rows, *(answers[row] for row in going)]
        self.cache = joined(parts, [one.sampling.max_new_tokens - len(one.tokens) + 1 for one in self.rows])

    @torch.inference_mode()
    def step(self) -> list[Answer]:
        """Compute one more token of every answer and drop the finished ones; returns all answers that took part."""
        took_part = list(self.rows)
        rows = list(range(len(took_part)))
        device = self.subject.device
        positions = torch.tensor([self.cache.lengths[row] for row in rows], device=device)
        tokens = torch.tensor([answer.tokens[-1] for answer in took_part], device=device)
        model = self.subject.model
        with self.subject.autocast():
            hidden = model.run_llm(model.embed(tokens), positions, PackedLayout([1] * len(rows), self.cache, rows))
        self._choose(took_part, hidden)
        self.drop([answer for answer in took_part if answer.finished])
        return took_part

    def drop(self, answers: Sequence[Answer]) -> None:
        """Remove answers from the batch."""
        gone = {id(answer) for answer in answers}
        kept = [row for row, answer in enumerate(self.rows) if id(answer) not in gone]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[row] for row in kept]
        self.cache = joined([(self.cache, row) for row in kept], [one.sampling.max_new_tokens - len(one.tokens) + 1 for one in self.rows])

    def _choose(self, answers: Sequence[Answer], hidden: Tensor) -> None:
        with self.subject.autocast():
            logits = self.subject.model.llm.lm_head(hidden)
        for answer, row in zip(answers, logits, strict=True):
            answer.choose(row)


@dataclass(frozen=True)
class ReadSamples:
    """Samples after prefill in one mode, up to where their answers begin."""

    cache: PackedCache
    hidden: Tensor
    """[N, llm width]: the last hidden state of each sample."""
    gaze: list[np.ndarray]
    """Per sample [frames, rows, columns], summing to 1 for each frame; empty if not requested, or if the model has no queries."""
    entropy: list[np.ndarray]
    """Per sample, the entropy in nats of the attention to each frame, averaged over heads and queries, as training logs it."""
    opened: list[np.ndarray] | None = None
    """Per sample int [frames, n]: the glance patches that each frame's queries opened, numbered row by row; None without a glance."""


@torch.inference_mode()
def read(
    subject: Subject,
    samples: Sequence[Sample],
    mode: Mode,
    *,
    chat: ChatFormat | None = None,
    gaze: bool = False,
    room: int = 0,
    features: FrameFeatures | None = None,
) -> ReadSamples:
    """Prefill samples that have no answers yet.

    `chat` replaces the model's chat format (for another system message), `room` is the number of further tokens to reserve in the cache,
    and `features` are the samples' encoded frames, if they are already known.
    """
    batch = pack(samples, chat or subject.chat, tokens_per_frame=subject.model.settings.tokens_per_frame).to(subject.device)
    with subject.autocast():
        context = read_batch(subject.model, batch, mode, features=features, weights=gaze, room=room)
    assert context.cache is not None
    ends = batch.cu_seqlens[1:].long() - 1
    maps, entropy = _gaze(context.weights, batch, subject)
    opened = None if context.opened is None else np.split(context.opened.flatten(1).cpu().numpy(), np.cumsum(batch.shown_counts)[:-1])
    return ReadSamples(context.cache, context.hidden[ends], maps, entropy, opened)


def _gaze(weights: Tensor | None, batch: PackedBatch, subject: Subject) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Gaze maps and entropy of each sample, from attention weights [V, heads, k, N]."""
    if weights is None:
        return [np.zeros((0, 0, 0))] * batch.n_samples, [np.zeros(0)] * batch.n_samples
    side = subject.model.gaze_px
    grid = (batch.frames.shape[1] // side, batch.frames.shape[2] // side)
    maps = over_patches(weights, grid[0] * grid[1]).mean(1).unflatten(-1, grid).cpu().numpy()
    entropy = torch.special.entr(weights.float()).sum(-1).mean((1, 2)).cpu().numpy()
    cuts = np.cumsum(batch.shown_counts)[:-1]
    return np.split(maps, cuts), np.split(entropy, cuts)


class TextPieces:
    """Incremental detokenizer; a character that spans several tokens appears once it is complete."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.said = ""

    def piece(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """Return the text that is new since the last call, given all tokens so far."""
        text = str(self.subject.tokenizer.decode(list(tokens), skip_special_tokens=True)).lstrip()
        text = text.rstrip() if last else text.rstrip(REPLACEMENT)
        new, self.said = text[len(self.said) :], text if len(text) > len(self.said) else self.said
        return new
