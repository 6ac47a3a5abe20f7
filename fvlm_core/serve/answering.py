"""Answers in progress, token by token: many at once, each at its own place, joined by new ones while they run (continuous batching,
Yu et al. 2022, https://www.usenix.org/conference/osdi22/presentation/yu).

A step computes one token of every answer in one packed pass, so the language model's weights are read once for all of them. A row's
numbers do not depend on the other rows.
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
"""What a tokenizer puts where the bytes of a character are not all there yet."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; greedily at temperature 0."""

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Answer:
    """One answer in progress."""

    sampling: Sampling
    stop_ids: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    finished: Literal["", "stop", "length"] = ""
    """Why there is no further token; empty while there may be."""

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.sampling.seed)

    def choose(self, logits: Tensor) -> None:
        """Take the next token by its logits [vocabulary]."""
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


class Answering:
    """Rows of answers in progress, over one KV cache."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.rows: list[Answer] = []
        self.cache = PackedCache([])
        self.hidden = torch.zeros(0)

    @torch.inference_mode()
    def add(self, answers: Sequence[Answer], cache: PackedCache, hidden: Tensor) -> None:
        """Let answers go on from the samples of a cache, whose last hidden states are [n, llm width]; each chooses its first token.

        The cache is copied: what it holds stays as it is.
        """
        self._choose(answers, hidden)
        going = [row for row, answer in enumerate(answers) if not answer.finished]
        parts = [(self.cache, row) for row in range(len(self.rows))] + [(cache, row) for row in going]
        self.rows = [*self.rows, *(answers[row] for row in going)]
        self.cache = joined(parts, [one.sampling.max_new_tokens - len(one.tokens) + 1 for one in self.rows])

    @torch.inference_mode()
    def step(self) -> list[Answer]:
        """One more token of every answer; returns those that took part. Finished ones leave."""
        took_part = list(self.rows)
        rows = list(range(len(took_part)))
        device = self.subject.device
        positions = torch.tensor([self.cache.lengths[row] for row in rows], device=device)
        tokens = torch.tensor([answer.tokens[-1] for answer in took_part], device=device)
        model = self.subject.model
        with self.subject.autocast():
            hidden = model.contextualise(model.embed(tokens), positions, PackedLayout([1] * len(rows), self.cache, rows))
        self._choose(took_part, hidden)
        self.drop([answer for answer in took_part if answer.finished])
        return took_part

    def drop(self, answers: Sequence[Answer]) -> None:
        """Give up some answers."""
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
    """Samples that a mode has read, up to where their answers begin."""

    cache: PackedCache
    hidden: Tensor
    """[N, llm width]: at the end of each."""
    gaze: list[np.ndarray]
    """Per sample [frames, rows, columns], each frame's adding up to 1; empty arrays where not asked for or nothing is queried."""
    entropy: list[np.ndarray]
    """Per sample, the entropy of the attention to each frame in nats, mean of heads and queries, as training logs it."""
    opened: list[np.ndarray] | None = None
    """Per sample int [frames, n]: the glance patches that each frame's queries opened, numbered row by row, where the model opens any."""


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
    """Read samples without answers; `chat` replaces the format (another system message), `features` are their encoded frames if at hand."""
    batch = pack(samples, chat or subject.chat, tokens_per_frame=subject.model.settings.tokens_per_frame).to(subject.device)
    with subject.autocast():
        context = read_batch(subject.model, batch, mode, features=features, weights=gaze, room=room)
    assert context.cache is not None
    ends = batch.cu_seqlens[1:].long() - 1
    maps, entropy = _gaze(context.weights, batch, subject)
    opened = None if context.opened is None else np.split(context.opened.flatten(1).cpu().numpy(), np.cumsum(batch.shown_counts)[:-1])
    return ReadSamples(context.cache, context.hidden[ends], maps, entropy, opened)


def _gaze(weights: Tensor | None, batch: PackedBatch, subject: Subject) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Maps and entropy of every sample, of attention weights [V, heads, k, N]."""
    if weights is None:
        return [np.zeros((0, 0, 0))] * batch.n_samples, [np.zeros(0)] * batch.n_samples
    side = subject.model.gaze_px
    grid = (batch.frames.shape[1] // side, batch.frames.shape[2] // side)
    maps = over_patches(weights, grid[0] * grid[1]).mean(1).unflatten(-1, grid).cpu().numpy()
    entropy = torch.special.entr(weights.float()).sum(-1).mean((1, 2)).cpu().numpy()
    cuts = np.cumsum(batch.shown_counts)[:-1]
    return np.split(maps, cuts), np.split(entropy, cuts)


class TextPieces:
    """Tokens to text, piece by piece; a character of several tokens appears once it is complete."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.said = ""

    def piece(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """What is new in the text of all tokens so far."""
        text = str(self.subject.tokenizer.decode(list(tokens), skip_special_tokens=True)).lstrip()
        text = text.rstrip() if last else text.rstrip(REPLACEMENT)
        new, self.said = text[len(self.said) :], text if len(text) > len(self.said) else self.said
        return new
