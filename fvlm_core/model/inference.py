"""The three inference modes over packed batches: token losses, logits, attention maps and generated answers.

`coarse_only` reads every frame with the static query. `coarse_fine` predicts queries from that and reads again; both process all frames in
parallel. `autoregressive` goes frame by frame with a KV cache and predicts each query from fine hidden states, as a stream has to. The
samples of a batch may have different lengths.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fvlm_core.data.batch import PackedBatch, Showing
from fvlm_core.model.attention import PackedCache, PackedLayout, to_device_async
from fvlm_core.model.encoder import FrameFeatures
from fvlm_core.model.foveated import FoveatedVLM, Read
from fvlm_core.model.names import Mode


@dataclass(frozen=True)
class Context:
    """Result of running a mode on a batch."""

    hidden: Tensor
    """[S, llm width]: last hidden state of every token."""
    tokens: Tensor
    """[V, k, llm width]: visual tokens of every shown frame."""
    weights: Tensor | None
    """[V, heads, k, N]: attention weights of the encoder's last layer, if requested."""
    cache: PackedCache | None
    """Keys and values of every token, if requested."""
    opened: Tensor | None = None
    """int64 [V, k, open]: the glance patches that the queries of every shown frame opened; None if no patches were chosen."""


@torch.no_grad()
def read_batch(
    model: FoveatedVLM,
    batch: PackedBatch,
    mode: Mode,
    *,
    features: FrameFeatures | None = None,
    weights: bool = False,
    room: int | None = None,
    queries: Tensor | None = None,
) -> Context:
    """Run a mode on a batch.

    `features`: encoded frames of the batch, if already computed. `weights`: return attention weights. `room`: return a KV cache with
    capacity for this many further tokens per sample. `queries` [V, k, D]: read with these queries instead of predicted ones. Raises
    ValueError for a mode that the model does not support.
    """
    if mode not in model.modes:
        raise ValueError(f"a model with query {model.settings.query!r} has no mode {mode!r}, only {', '.join(model.modes)}")
    if not len(batch.shown_frames):
        return _context(model, batch, None, room)
    features = model.encode(batch.frames) if features is None else features
    if queries is not None:
        return _context(model, batch, model.read_fine(features, queries, batch, weights=weights), room)
    if mode == "autoregressive":
        return _autoregressive(model, batch, features, weights=weights, room=room)
    read = model.read_coarse(features, batch, weights=weights and mode == "coarse_only")
    if mode == "coarse_fine":
        hidden = _query_states(model, batch, read)
        read = model.read_fine(features, model.queries(hidden, batch), batch, weights=weights)
    return _context(model, batch, read, room)


@torch.no_grad()
def token_losses(model: FoveatedVLM, batch: PackedBatch, mode: Mode, *, features: FrameFeatures | None = None) -> Tensor:
    """Cross-entropy [n labelled], fp32, of every labelled position, in order."""
    return model.label_losses(read_batch(model, batch, mode, features=features).hidden, batch)


@torch.no_grad()
def logits(model: FoveatedVLM, batch: PackedBatch, mode: Mode) -> Tensor:
    """Next-token logits [S, vocabulary]."""
    return model.llm.lm_head(read_batch(model, batch, mode).hidden)


@torch.no_grad()
def gaze(model: FoveatedVLM, batch: PackedBatch, mode: Mode) -> Tensor:
    """Attention maps [V, k, rows, columns] of every shown frame's queries: last layer, mean of heads, normalised over patches.

    Raises ValueError for a model whose query is pooled.
    """
    features = model.encode(batch.frames)
    weights = read_batch(model, batch, mode, features=features, weights=True).weights
    if weights is None:
        raise ValueError(f"a model with query {model.settings.query!r} has no attention maps")
    return over_patches(weights, features.grid[0] * features.grid[1]).unflatten(-1, features.grid)


def over_patches(weights: Tensor, patches: int) -> Tensor:
    """Average attention weights [V, heads, k, 1 + patches] over heads and normalise them over patches -> [V, k, patches].

    All zero if the CLS token has all of the attention.
    """
    read = weights.float().mean(1)[..., -patches:]
    return read / read.sum(-1, keepdim=True).clamp(min=torch.finfo(read.dtype).tiny)


@torch.no_grad()
def generate(model: FoveatedVLM, batch: PackedBatch, mode: Mode, *, max_new_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
    """Generate an answer to every sample, greedily. Sequences must end where the answer begins. Answers exclude the stop token."""
    context = read_batch(model, batch, mode, room=max_new_tokens)
    assert context.cache is not None
    ends = batch.cu_seqlens[1:].long() - 1
    return continue_greedily(model, context.cache, context.hidden[ends], max_new_tokens=max_new_tokens, stop_ids=stop_ids)


@torch.no_grad()
def continue_greedily(
    model: FoveatedVLM, cache: PackedCache, hidden: Tensor, *, max_new_tokens: int, stop_ids: Sequence[int]
) -> list[list[int]]:
    """Decode greedily, given a cache and the last hidden states [N, llm width] of its samples. Answers exclude the stop token."""
    answers: list[list[int]] = [[] for _ in range(len(hidden))]
    rows = list(range(len(hidden)))
    for _ in range(max_new_tokens):
        picked = model.llm.lm_head(hidden).argmax(-1)
        going = [n for n, token in enumerate(picked.tolist()) if token not in stop_ids]
        rows, picked = [rows[n] for n in going], picked[going]
        for row, token in zip(rows, picked.tolist(), strict=True):
            answers[row].append(token)
        if not rows or max(len(answers[row]) for row in rows) == max_new_tokens:
            break
        positions = torch.tensor([cache.lengths[row] for row in rows], device=picked.device)
        hidden = model.run_llm(model.embed(picked), positions, PackedLayout([1] * len(rows), cache, rows))
    return answers


def _context(model: FoveatedVLM, batch: PackedBatch, read: Read | None, room: int | None) -> Context:
    """Run the language model over the complete batch, with its visual tokens inserted."""
    embeddings = _embeddings(model, batch, read)
    cache = None if room is None else PackedCache([length + room for length in batch.lengths])
    hidden = model.run_llm(embeddings, batch.position_ids, PackedLayout(batch.lengths, cache))
    tokens = embeddings.new_zeros(0, 1, embeddings.shape[-1]) if read is None else read.tokens
    return Context(hidden, tokens, None if read is None else read.weights, cache, None if read is None else read.opened)


def _embeddings(model: FoveatedVLM, batch: PackedBatch, read: Read | None) -> Tensor:
    text = model.embed(batch.input_ids)
    return text if read is None else text.index_copy(0, batch.visual_positions.flatten(), read.tokens.flatten(0, 1).to(text.dtype))


def _query_states(model: FoveatedVLM, batch: PackedBatch, read: Read) -> Tensor:
    """Hidden states [S, llm width] of the prefixes that queries depend on, zero elsewhere."""
    embeddings = _embeddings(model, batch, read)
    starts = PackedLayout(batch.lengths).offsets[:-1]
    ranges = [torch.arange(start, start + length) for start, length in zip(starts, batch.query_prefix, strict=True) if length]
    if not ranges:
        return torch.zeros_like(embeddings)
    index = to_device_async(torch.cat(ranges), embeddings.device)
    layout = PackedLayout([length for length in batch.query_prefix if length])
    states = model.run_llm(embeddings[index], batch.position_ids[index], layout)
    return torch.zeros_like(embeddings, dtype=states.dtype).index_copy(0, index, states)


def _autoregressive(model: FoveatedVLM, batch: PackedBatch, features: FrameFeatures, *, weights: bool, room: int | None) -> Context:
    """Run frame by frame: step t processes the t-th frame of every sample that has one.

    Tokens between two frames wait until a query needs a hidden state after them. So the language model runs at most once per step, on the
    waiting tokens only, and once more at the end.
    """
    cache = PackedCache([length + (room or 0) for length in batch.lengths])
    embeddings = model.embed(batch.input_ids)
    hidden = torch.zeros_like(embeddings)
    *done, _ = PackedLayout(batch.lengths).offsets  # per sample, the next position that the language model has to process
    sources, positions = batch.query_sources.tolist(), batch.visual_positions.tolist()
    tokens: list[Tensor] = []
    attended: list[Tensor] = []
    opened: list[Tensor] = []
    order: list[int] = []

    def advance(until: dict[int, int]) -> None:
        """Run the language model on each sample up to, not including, a position of the packed sequence."""
        rows = [row for row, end in until.items() if end > done[row]]
        if not rows:
            return
        index = to_device_async(torch.cat([torch.arange(done[row], until[row]) for row in rows]), embeddings.device)
        layout = PackedLayout([until[row] - done[row] for row in rows], cache, rows)
        hidden[index] = model.run_llm(embeddings[index], batch.position_ids[index], layout).to(hidden.dtype)
        for row in rows:
            done[row] = until[row]

    for step in _steps(batch):
        advance({row: max(sources[shown]) + 1 for row, shown in step})
        now = [shown for _, shown in step]
        part = _part(batch, now)
        queries = model.queries(hidden, part)
        read = model.read_fine(features.select(part.shown_frames), queries, _one_by_one(part), weights=weights)
        embeddings[[place for shown in now for place in positions[shown]]] = read.tokens.flatten(0, 1).to(embeddings.dtype)
        tokens.append(read.tokens)
        order.extend(now)
        if read.weights is not None:
            attended.append(read.weights)
        if read.opened is not None:
            opened.append(read.opened)
    advance(dict(enumerate(PackedLayout(batch.lengths).offsets[1:])))
    back = torch.tensor(order, device=embeddings.device).argsort()
    looked = [torch.cat(parts)[back] if parts else None for parts in (attended, opened)]
    return Context(hidden, torch.cat(tokens)[back], looked[0], cache, looked[1])


def _steps(batch: PackedBatch) -> Iterator[list[tuple[int, int]]]:
    """Yield, for each time step, (sample, shown frame) pairs of the samples that have a frame at that step."""
    starts = [0]
    for count in batch.shown_counts:
        starts.append(starts[-1] + count)
    for time in range(max(batch.shown_counts)):
        yield [(row, starts[row] + time) for row, count in enumerate(batch.shown_counts) if time < count]


def _part(batch: PackedBatch, shown: list[int]) -> PackedBatch:
    """Return the batch restricted to some of its shown frames."""
    index = torch.tensor(shown, device=batch.shown_frames.device)
    return replace(
        batch,
        shown_frames=batch.shown_frames[index],
        visual_positions=batch.visual_positions[index],
        query_sources=batch.query_sources[index],
    )


def _one_by_one(part: PackedBatch) -> PackedBatch:
    """Return the batch with one entry of features per shown frame, for features selected by `shown_frames`."""
    every = torch.arange(len(part.shown_frames), device=part.shown_frames.device)
    return replace(part, showings=[Showing(every, every[:, None])])
