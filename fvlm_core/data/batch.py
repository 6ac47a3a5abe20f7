"""Packed batches: the frames of all samples are one flat image batch, their tokens one packed sequence. Nothing is padded.

A sample's sequence is `system, user turn, answer` in SmolLM2's chat format; its frames come before the first user text
(video first) or after it (question first). Every shown frame takes `tokens_per_frame` positions. An image that is shown several
times, and frames that several samples share, are stored (and encoded) once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""Label of a position without a target."""
NO_SOURCE = -1
"""Query source of a frame whose query is `q_init`."""


@dataclass(frozen=True)
class Turn:
    """One question and its answer, as token ids without any template."""

    question_ids: list[int]
    answer_ids: list[int]
    """Empty when the answer is to be generated."""
    rejected_ids: list[int] | None = None
    """The rejected answer, in the last turn of a preference; `answer_ids` is the chosen one."""


@dataclass(frozen=True)
class Sample:
    """One training or evaluation sample, decoded."""

    key: str
    source: str
    frames: np.ndarray
    """uint8 [F, H, W, 3]: the distinct frames; F = 0 for text-only."""
    media: list[list[int]]
    """Per video or image, the frames to show in order, as indexes into `frames`; an image repeats one index."""
    turns: list[Turn]
    question_first: bool = False
    label_questions: bool = False
    """Label the question tokens as well as the answers (captioning, stage 1)."""

    def pair(self) -> "tuple[Sample, Sample]":
        """Return the sample with its chosen answer, and with its rejected answer. Raises ValueError if it has none.

        Labels of earlier turns are the same in both, so they cancel out.
        """
        *before, last = self.turns
        if not last.rejected_ids:
            raise ValueError("no rejected answer")
        return self, replace(self, turns=[*before, Turn(last.question_ids, last.rejected_ids)])


@dataclass(frozen=True)
class ChatFormat:
    """Token ids of the chat format's fixed parts (see `fvlm_core.data.tokenizer.chat_format`)."""

    system: list[int]
    """The whole system message, with its markers."""
    user_open: list[int]
    user_close: list[int]
    assistant_open: list[int]
    assistant_close: list[int]
    """Its first token (`<|im_end|>`) is labelled: the model learns to stop."""


@dataclass(frozen=True)
class Showing:
    """Frames that are shown equally often: f frames, m times each."""

    frames: Tensor
    """int64 [f]: indexes into the batch's frames."""
    shown: Tensor
    """int64 [f, m]: positions of each of them in `shown_frames`."""


@dataclass(frozen=True)
class PackedBatch:
    """N samples, F distinct frames, V shown frames of k tokens each, S tokens in total."""

    frames: Tensor
    """uint8 [F, H, W, 3]."""
    input_ids: Tensor
    """int64 [S]; 0 at the positions of visual tokens."""
    labels: Tensor
    """int64 [S]: the token to predict at each position (already shifted), or IGNORE."""
    position_ids: Tensor
    """int64 [S], starting at 0 in each sample."""
    cu_seqlens: Tensor
    """int32 [N + 1]: where each sample starts in the packed sequence."""
    shown_frames: Tensor
    """int64 [V]: index into `frames` of every shown frame, in sequence order."""
    visual_positions: Tensor
    """int64 [V, k]: positions of each shown frame's tokens."""
    query_sources: Tensor
    """int64 [V, k]: the position whose hidden state gives each query, or NO_SOURCE for `q_init`."""
    showings: list[Showing]
    """Every distinct frame once, grouped by how often it is shown."""
    lengths: list[int]
    """Tokens of each sample."""
    shown_counts: list[int]
    """Shown frames of each sample."""
    query_prefix: list[int]
    """Per sample, how many of its first tokens the queries depend on; 0 if no query comes from the LLM."""
    label_prefix: list[int]
    """Per sample, how many of its first tokens the loss depends on; 0 if nothing is labelled."""
    labelled: np.ndarray
    """int64 [n labels]: the labelled positions. On the host, because finding them on a device would synchronise with it."""
    keys: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    @property
    def n_samples(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def n_labels(self) -> int:
        """Number of labelled positions."""
        return len(self.labelled)

    def to(self, device: torch.device, *, non_blocking: bool = True) -> "PackedBatch":
        """Return the batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """Return the batch in page-locked memory (torch's DataLoader calls this)."""
        return self._map(Tensor.pin_memory)

    def _map(self, function) -> "PackedBatch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        values["showings"] = [Showing(function(group.frames), function(group.shown)) for group in self.showings]
        return PackedBatch(**values)


@dataclass(frozen=True)
class StoredFrames:
    """Frames of a batch that are already in one tensor."""

    frames: Tensor
    """uint8 [F, H, W, 3]."""
    first: list[int]
    """Per sample, the index of its first frame; equal for samples about the same frames."""


def pack(samples: Sequence[Sample], chat: ChatFormat, *, tokens_per_frame: int = 1, stored: StoredFrames | None = None) -> PackedBatch:
    """Lay out samples as one packed batch. Raises ValueError for no samples or frames of different sizes.

    Samples that hold the same array of frames share them. With `stored`, no frame is copied.
    """
    if not samples:
        raise ValueError("cannot pack an empty batch")
    ids: list[int] = []
    labels: list[int] = []
    starts = [0]
    shown: list[int] = []
    positions: list[list[int]] = []
    query_sources: list[list[int]] = []
    stored = stored or _stacked(samples)
    for number, sample in enumerate(samples):
        start = len(ids)
        targets: list[int] = []  # the token if it is a target, else IGNORE; shifted below
        for piece, labelled in _pieces(sample, chat):
            if isinstance(piece, _Frames):
                for count, index in enumerate(piece.indexes):
                    here = [len(ids) + slot for slot in range(tokens_per_frame)]
                    if count:
                        query_sources.append(positions[-1])
                    else:
                        query_sources.append([len(ids) - 1 if sample.question_first else NO_SOURCE] * tokens_per_frame)
                    positions.append(here)
                    shown.append(stored.first[number] + index)
                    ids.extend([0] * tokens_per_frame)
                    targets.extend([IGNORE] * tokens_per_frame)
            else:
                ids.extend(piece)
                targets.extend(piece if labelled else [IGNORE] * len(piece))
        labels.extend([*targets[1:], IGNORE])
        starts.append(len(ids))
        assert len(labels) == len(ids) == start + len(targets)
    lengths = [end - start for start, end in pairwise(starts)]
    sources = np.array(query_sources, np.int64).reshape(-1, tokens_per_frame)
    return PackedBatch(
        frames=stored.frames,
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        shown_frames=torch.tensor(shown, dtype=torch.int64),
        visual_positions=torch.tensor(positions, dtype=torch.int64).reshape(-1, tokens_per_frame),
        query_sources=torch.from_numpy(sources),
        showings=_showings(np.array(shown, np.int64), len(stored.frames)),
        lengths=lengths,
        shown_counts=[sum(len(indexes) for indexes in sample.media) for sample in samples],
        query_prefix=[int(max(sources[(sources >= a) & (sources < b)], default=a - 1)) + 1 - a for a, b in pairwise(starts)],
        label_prefix=[max((n + 1 for n, label in enumerate(labels[a:b]) if label != IGNORE), default=0) for a, b in pairwise(starts)],
        labelled=np.flatnonzero(np.array(labels) != IGNORE),
        keys=[sample.key for sample in samples],
        sources=[sample.source for sample in samples],
    )


def _showings(shown: np.ndarray, n_frames: int) -> list[Showing]:
    order, counts = np.argsort(shown, kind="stable"), np.bincount(shown, minlength=n_frames)
    starts = np.cumsum(counts) - counts
    groups = []
    for times in np.unique(counts[counts > 0]):
        frames = np.flatnonzero(counts == times)
        places = order[starts[frames][:, None] + np.arange(times)]
        groups.append(Showing(torch.from_numpy(frames), torch.from_numpy(places)))
    return groups


@dataclass(frozen=True)
class _Frames:
    indexes: list[int]


def _pieces(sample: Sample, chat: ChatFormat) -> Iterator[tuple[list[int] | _Frames, bool]]:
    """Yield the sample's sequence in order: token ids or shown frames, and whether the tokens are targets."""
    media = [_Frames(indexes) for indexes in sample.media]
    yield chat.system, False
    for number, turn in enumerate(sample.turns):
        yield chat.user_open, False
        if number == 0 and not sample.question_first:
            yield from ((piece, False) for piece in media)
        yield turn.question_ids, sample.label_questions
        if number == 0 and sample.question_first:
            yield from ((piece, False) for piece in media)
        yield chat.user_close, False
        yield chat.assistant_open, False
        if turn.answer_ids:
            yield turn.answer_ids, True
            yield chat.assistant_close[:1], True
            yield chat.assistant_close[1:], False


def _stacked(samples: Sequence[Sample]) -> StoredFrames:
    """Concatenate the samples' frames. An array that several samples share is stored once."""
    sizes = {sample.frames.shape[1:] for sample in samples if len(sample.frames)}
    if len(sizes) > 1:
        raise ValueError(f"frames of different sizes in one batch: {sorted(sizes)}")
    kept: list[np.ndarray] = []
    places: dict[int, int] = {}
    total = 0
    for sample in samples:
        if id(sample.frames) not in places:
            places[id(sample.frames)] = total
            kept.append(sample.frames)
            total += len(sample.frames)
    some = [frames for frames in kept if len(frames)]
    frames = np.concatenate(some) if some else np.zeros((0, 1, 1, 3), np.uint8)
    return StoredFrames(torch.from_numpy(frames), [places[id(sample.frames)] for sample in samples])
