"""A conversation about a video: its frames are encoded once, and answers are streamed as they are computed.

A question **after** the video continues from the KV cache of the conversation so far. A question **before** the video starts a new
conversation: only text that precedes the frames can direct where the model looks in the first of them, so the video is read again for each
such question (the encoder's features are kept).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fvlm_core.data.batch import Sample, Turn
from fvlm_core.data.frames import ClipError
from fvlm_core.errors import UserError
from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
from fvlm_core.eval.media import IMAGE_SUFFIXES, FrameFolder, Images, Media, VideoFile
from fvlm_core.model.attention import PackedCache, PackedLayout
from fvlm_core.model.decoding import joined
from fvlm_core.model.encoder import FrameFeatures
from fvlm_core.model.names import Mode
from fvlm_core.serve.batched_decoding import Answer, DecodingBatch, ReadSamples, Sampling, TextPieces, read
from fvlm_core.serve.load import default_mode


def open_media(path: Path, answerer: FoveatedAnswerer) -> Media:
    """Load a video, a picture or a folder of frames as the model's frames. Raises UserError if it is missing or cannot be decoded."""
    if not path.exists():
        raise UserError("there is no such file", where=str(path), fix="give the path of a video, a picture, or a folder of frames")
    if path.is_dir():
        source = FrameFolder(path)
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        source = Images((path,))
    else:
        source = VideoFile(path)
    try:
        return source.load(answerer.rule, answerer.image_repeats)
    except ClipError as error:
        raise UserError(f"it cannot be shown: {error}", where=str(path), fix="give an intact video, such as a player plays") from error


@dataclass
class Session:
    """A model, and a conversation about one set of media."""

    answerer: FoveatedAnswerer
    media: Media
    turns: list[Turn] = field(default_factory=list)
    """The conversation so far."""
    _features: FrameFeatures | None = None
    _mode: Mode | None = None
    """Mode in which the media were read for this conversation."""
    _cache: PackedCache | None = None
    """KV cache of the conversation, up to where the last answer began."""

    def ask(
        self, question: str, *, mode: Mode | None = None, question_first: bool = False, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """Yield the answer in pieces. A question before the video, or a change of mode, starts a new conversation.

        Raises UserError if conversation and answer do not fit into the model's context.
        """
        mode, sampling = mode or default_mode(self.answerer), sampling or Sampling()
        subject = self.answerer.subject
        question_ids = subject.encode(question.strip())
        if question_first or mode != self._mode:
            self.forget()
        self._check_length(question_ids, sampling.max_new_tokens)
        if self._cache is None:
            found = self.look(question_ids, mode, question_first=question_first)
            cache, hidden = found.cache, found.hidden
        else:
            cache, hidden = self._go_on(self._cache, question_ids)
        answer = Answer(sampling, subject.chat.assistant_close[:1])
        running, pieces = DecodingBatch(subject), TextPieces(subject)
        running.add([answer], cache, hidden)
        while not answer.finished:
            yield pieces.piece(answer.tokens)
            running.step()
        yield pieces.piece(answer.tokens, last=True)
        self._mode, self._cache = mode, cache
        self.turns.append(Turn(question_ids, answer.tokens))

    def look(self, question_ids: Sequence[int], mode: Mode, *, question_first: bool, gaze: bool = False) -> ReadSamples:
        """Prefill the media with one question, up to where its answer begins."""
        subject = self.answerer.subject
        if self._features is None and len(self.media.frames):
            with torch.inference_mode(), subject.autocast():
                self._features = subject.model.encode(torch.from_numpy(self.media.frames).to(subject.device))
        first = question_first and bool(self.media.shown)
        sample = Sample("", "", self.media.frames, self.media.shown, [Turn(list(question_ids), [])], question_first=first)
        return read(subject, [sample], mode, gaze=gaze, features=self._features)

    def forget(self) -> None:
        """Start a new conversation about the same media."""
        self.turns, self._cache, self._mode = [], None, None

    @torch.inference_mode()
    def _go_on(self, before: PackedCache, question_ids: Sequence[int]) -> tuple[PackedCache, Tensor]:
        """Extend the conversation by the last answer and the next question; returns its cache and last hidden state."""
        subject, chat = self.answerer.subject, self.answerer.subject.chat
        last = self.turns[-1].answer_ids
        tail = [*last, *chat.assistant_close, *chat.user_open, *question_ids, *chat.user_close, *chat.assistant_open]
        cache = joined([(before, 0)], [len(tail)])
        positions = torch.arange(before.lengths[0], before.lengths[0] + len(tail), device=subject.device)
        embedded = subject.model.embed(torch.tensor(tail, device=subject.device))
        with subject.autocast():
            hidden = subject.model.run_llm(embedded, positions, PackedLayout([len(tail)], cache))
        return cache, hidden[-1:]

    def _check_length(self, question_ids: Sequence[int], new_tokens: int) -> None:
        chat, model = self.answerer.subject.chat, self.answerer.subject.model
        if self._cache is None:
            before = len(chat.system) + self.media.n_shown * model.settings.tokens_per_frame
        else:
            before = self._cache.lengths[0] + len(self.turns[-1].answer_ids) + len(chat.assistant_close)
        turn = len(chat.user_open) + len(question_ids) + len(chat.user_close) + len(chat.assistant_open)
        needed, context = before + turn + new_tokens, model.llm.config.max_position_embeddings
        if needed > context:
            raise UserError(
                f"conversation and answer need {needed} tokens, the model's context has {context}",
                where="the question",
                fix="begin a new conversation, ask a shorter question, or allow fewer new tokens",
            )


@dataclass(frozen=True)
class Gaze:
    """Where the model looks in each shown frame, for one question."""

    frames: np.ndarray
    """uint8 [T, H, W, 3]."""
    coarse: np.ndarray
    """float [T, rows, columns]: attention of the static query `q_static`, summing to 1 for each frame."""
    fine: np.ndarray
    """The same, for the queries that the language model computes."""
    entropy: np.ndarray
    """float [T]: entropy of the fine attention to each frame, in nats; uniform attention to n patches has log(n)."""
    opened: np.ndarray | None = None
    """int [T, n]: the patches, numbered row by row, that the fine queries opened at a finer resolution; None without a glance."""


def gaze(session: Session, question: str, *, mode: Mode | None = None, question_first: bool = True) -> Gaze:
    """Compute where the model looks for a question. Raises UserError for a model without queries, or the mode `coarse_only`."""
    answerer = session.answerer
    if not answerer.subject.gazes:
        fix = "use a model with query deep, shallow or random"
        raise UserError("this model pools its patches: it does not look anywhere", where=answerer.name, fix=fix)
    if mode == "coarse_only":
        raise UserError("coarse attention is shown beside the other modes'", where="mode", fix="use coarse_fine or autoregressive")
    ids = answerer.subject.encode(question.strip())
    coarse = session.look(ids, "coarse_only", question_first=question_first, gaze=True)
    fine = session.look(ids, mode or "coarse_fine", question_first=question_first, gaze=True)
    shown = [index for indexes in session.media.shown for index in indexes]
    opened = None if fine.opened is None else fine.opened[0]
    return Gaze(session.media.frames[shown], coarse.gaze[0], fine.gaze[0], fine.entropy[0], opened)
