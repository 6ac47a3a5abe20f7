"""From shards to packed batches: random access through the index, one read per sample, frames decoded by libjpeg-turbo.

`train_steps` yields what one rank computes in each optimizer step, `val_batches` a fixed validation set in a fixed order.
A damaged sample is logged, counted and replaced by the next of its source, up to a limit.
"""

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import count, islice
from math import ceil
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from fvlm_core.config import DataSettings, RunSettings
from fvlm_core.data.batch import ChatFormat, PackedBatch, Sample, Turn, pack
from fvlm_core.data.jobs import ShardManifest, Split
from fvlm_core.data.mixture import Mixture, apportion, coin, deal
from fvlm_core.data.shard_files import INDEX, TOKENIZER
from fvlm_core.data.tokenizer import chat_format, load_tokenizer
from fvlm_core.errors import UserError

logger = logging.getLogger(__name__)

MAX_CORRUPT_SHARE = 0.01
"""Of a mixture's rows (at least one row) may be damaged before the run is stopped."""
PREFETCH_STEPS = 2
"""Steps read ahead: by a thread without loader processes, by each of them with."""
OPEN_SHARDS = 256
"""Tars kept open at a time."""
MEMBER_COLUMNS = ("json_offset", "json_size", "frame_offsets", "frame_sizes")
VAL_SEED = 0
"""The validation set is the same for every run, whatever its seed."""

Item = TypeVar("Item")


class CorruptSampleError(Exception):
    """A sample whose bytes are not what the index promises."""


class ShardSet:
    """The shards of a ShardManifest's folder. A row is one (sample, conversation), named by its number in the index."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if the folder has no manifest or no readable index."""
        self.folder = Path(folder)
        self.manifest = ShardManifest.read(self.folder)
        try:
            self._table = pq.read_table(self.folder / INDEX)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"the index cannot be read: {error}", where=str(self.folder / INDEX), fix="make the shards again") from error
        self._shards = self._table["shard"].to_pylist()
        self._conversations, self._json_offsets, self._json_sizes, self.n_frames, self.n_tokens = (
            self._table[name].to_numpy() for name in ("conversation", "json_offset", "json_size", "n_frames", "n_tokens")
        )
        self.is_caption = np.array([task == "caption" for task in self._table["task"].to_pylist()])
        self._offsets, self._sizes = (self._table[name].combine_chunks() for name in ("frame_offsets", "frame_sizes"))
        self._open = lru_cache(maxsize=OPEN_SHARDS)(lambda name: _ShardFile(self.folder / name))

    def __reduce__(self) -> tuple:
        """Loader processes open the folder themselves."""
        return ShardSet, (self.folder,)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder / TOKENIZER)

    @cached_property
    def chat(self) -> ChatFormat:
        return chat_format(self.tokenizer)

    @cached_property
    def _frame(self) -> pd.DataFrame:
        return self._table.drop_columns(list(MEMBER_COLUMNS)).to_pandas()

    def rows(self, split: Split, source: str | None = None) -> pd.DataFrame:
        """Rows of a split (and source) in shard order; its index holds the row numbers that `read` and `record` take.

        Columns: split, source, kind, task, shard, key, conversation, n_frames, n_tokens, n_answer_tokens, duration_s.
        """
        chosen = self._frame["split"] == split
        return self._frame.loc[chosen & (self._frame["source"] == source) if source else chosen]

    def record(self, row: int) -> dict[str, Any]:
        """The sample's JSON. Raises CorruptSampleError."""
        content = self._open(self._shards[row]).read(int(self._json_offsets[row]), int(self._json_sizes[row]))
        return _parse(content)

    def read(self, row: int, *, image_repeats: int, question_first: bool = False, label_questions: bool = False) -> Sample:
        """The row's conversation with its frames; an image is shown `image_repeats` times. Raises CorruptSampleError."""
        offsets, sizes = self._offsets[row].values.to_numpy(), self._sizes[row].values.to_numpy()
        start, end = int(self._json_offsets[row]), int(self._json_offsets[row] + self._json_sizes[row])
        first = int(offsets[0]) if len(offsets) else start
        content = self._open(self._shards[row]).read(first, end - first)  # the members are neighbours: one read gets them all
        record = _parse(content[start - first :])
        side = self.manifest.frame_px
        frames = np.empty((len(offsets), side, side, 3), np.uint8)
        for frame, offset, size in zip(frames, offsets - first, sizes, strict=True):
            _decode(content[offset : offset + size], frame)
        try:
            turns = [
                Turn(turn["question_ids"], turn["answer_ids"], turn.get("rejected_ids"))
                for turn in record["conversations"][self._conversations[row]]
            ]
            shown = [[index] * image_repeats for index in range(len(frames))] if record["kind"] == "image" else [list(range(len(frames)))]
            return Sample(
                key=record["key"],
                source=record["source"],
                frames=frames,
                media=shown if len(frames) else [],
                turns=turns,
                question_first=question_first,
                label_questions=label_questions,
            )
        except (KeyError, IndexError, TypeError) as error:
            raise CorruptSampleError(f"its JSON lacks {error}") from error

    def longest_sequence(self, data: DataSettings, *, tokens_per_frame: int) -> int:
        """Tokens of the longest packed sample of what is trained and validated on; to be held against a model's context."""
        chosen = self._frame["source"].isin([part.source for part in [*data.mixture, *data.held_out.mixture]]).to_numpy()
        repeats = np.where(self._frame["kind"] == "image", data.image_repeats, 1)
        return int((self.n_tokens + self.n_frames * repeats * tokens_per_frame)[chosen].max(initial=0))


def train_steps(
    shards: ShardSet,
    data: DataSettings,
    run: RunSettings,
    *,
    tokens_per_frame: int,
    rank: int,
    world_size: int,
    first_step: int = 0,
) -> Iterator[list[PackedBatch]]:
    """This rank's micro-batches of every optimizer step from `first_step` to `run.steps` (without end where that is None).

    Every rank gets the same number of micro-batches, none empty; preferences come as pairs, chosen and rejected in turn. Raises
    UserError if the mixture does not fit the shards, the batch does not divide among the ranks, or too many samples are damaged.
    """
    steps = _Steps(shards, data, run, tokens_per_frame, rank, world_size)
    numbers = count(first_step) if run.steps is None else range(first_step, run.steps)
    reads: Iterable[_Read]
    pinned = torch.cuda.is_available()
    if data.workers:
        reads = DataLoader(
            steps,
            batch_size=None,
            sampler=numbers,
            num_workers=data.workers,
            prefetch_factor=PREFETCH_STEPS,
            multiprocessing_context=_clean_processes(),
            pin_memory=pinned,
            collate_fn=_as_it_is,
        )
    else:
        reads = _ahead((lambda number: steps[number].pin_memory()) if pinned else steps.__getitem__, numbers, PREFETCH_STEPS)
    yield from _without_corrupt(reads, steps.max_corrupt, shards.folder)


def distinct_batches(
    shards: ShardSet, data: DataSettings, run: RunSettings, *, tokens_per_frame: int, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, PackedBatch]]:
    """What `train_steps` goes through in all its steps, every sample once, in numbered batches of `run.micro_batch_samples`.

    A sample shown in both question orders comes in both, and those that would take the place of damaged ones come too. Batches
    that are not `wanted` are not read. Raises UserError as `train_steps` does.
    """
    assert run.steps is not None
    steps = _Steps(shards, data, run, tokens_per_frame, rank=0, world_size=1)
    reader = steps.reader
    planned = [slot for step in range(run.steps) for slot in steps.samples(step)]
    last = {slot.source: slot.position for slot in planned}
    spare = [reader.slot(source, position + 1 + n) for source, position in last.items() for n in range(reader.max_corrupt)]
    slots = {reader.content(slot): slot for slot in [*planned, *spare]}
    ordered = [slots[key] for key in sorted(slots)]
    chunks = [ordered[start : start + run.micro_batch_samples] for start in range(0, len(ordered), run.micro_batch_samples)]
    numbers = [number for number in range(len(chunks)) if wanted(number)]
    reads = _ahead(lambda number: reader.pack([chunks[number]]), numbers, PREFETCH_STEPS)
    for number, (batch,) in zip(numbers, _without_corrupt(reads, reader.max_corrupt, shards.folder), strict=True):
        yield number, batch


def val_batches(
    shards: ShardSet,
    n_samples: int,
    data: DataSettings,
    *,
    tokens_per_frame: int,
    batch_samples: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[PackedBatch]:
    """`n_samples` validation samples mixed as `data.held_out` says (fewer where a source has fewer), every `world_size`th batch of them.

    Preferences come as pairs, chosen and rejected in turn. The samples and their order depend on nothing else. Raises UserError if
    a source of the mixture has no validation samples.
    """
    data = data.held_out
    parts = [part for part in data.mixture if part.share > 0]
    rows = _source_rows(shards, "val", [part.source for part in parts])
    mixture = Mixture([part.source for part in parts], [part.share for part in parts], [len(numbers) for numbers in rows], VAL_SEED)
    reader = _Reader(shards, data, mixture, rows, tokens_per_frame)
    slots = []
    for source, wanted in enumerate(apportion([part.share for part in parts], n_samples)):
        for position in range(min(wanted, len(rows[source]))):
            slots.append(reader.slot(source, position))
    batches = [slots[start : start + batch_samples] for start in range(0, len(slots), batch_samples)][rank::world_size]
    reads = _ahead(lambda number: reader.pack([batches[number]]), range(len(batches)), PREFETCH_STEPS)
    for batch in _without_corrupt(reads, reader.max_corrupt, shards.folder):
        yield from batch


@dataclass(frozen=True)
class _Slot:
    """A sample of the plan."""

    source: int
    position: int
    """In the source's endless sequence."""
    question_first: bool


@dataclass(frozen=True)
class _Read:
    """What a step's samples became; damaged ones travel back with it, since they may have been found in another process."""

    batches: list[PackedBatch]
    corrupt: dict[int, str]
    """Row and reason."""
    error: tuple[str, str, str] | None = None
    """What, where and fix of a UserError: torch cannot raise one again out of a loader process."""

    def pin_memory(self) -> "_Read":
        """With its batches in page-locked memory, from where they travel to a GPU while it computes (DataLoader calls this)."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


class _Reader:
    """Reads planned samples and packs them."""

    def __init__(self, shards: ShardSet, data: DataSettings, mixture: Mixture, rows: list[np.ndarray], tokens_per_frame: int) -> None:
        self.shards, self.data, self.mixture, self.rows, self.tokens_per_frame = shards, data, mixture, rows, tokens_per_frame
        self.max_corrupt = max(1, int(MAX_CORRUPT_SHARE * sum(map(len, rows))))

    def slot(self, source: int, position: int) -> _Slot:
        """What stands at a position of a source's endless sequence."""
        return _Slot(source, position, coin(self.data.question_first, self.mixture.seed, self.mixture.names[source], position))

    def row(self, slot: _Slot) -> int:
        """The row of a planned sample."""
        return int(self.rows[slot.source][self.mixture.row(slot.source, slot.position)])

    def content(self, slot: _Slot) -> tuple[int, bool]:
        """The row of a planned sample, and whether its question comes first: equal for equal samples."""
        row = self.row(slot)
        return row, slot.question_first and not self.shards.is_caption[row] and self.shards.n_frames[row] > 0

    def pack(self, micro_batches: list[list[_Slot]]) -> _Read:
        corrupt: dict[int, str] = {}
        batches = []
        for slots in micro_batches:
            samples = [sample for slot in slots if (sample := self._sample(slot, corrupt))]
            if self.data.loss_on == "preferences":
                samples = [one for sample in samples for one in self._pair(sample)]
            if len(corrupt) > self.max_corrupt:
                return _Read([], corrupt)
            batches.append(pack(samples, self.shards.chat, tokens_per_frame=self.tokens_per_frame))
        return _Read(batches, corrupt)

    def _pair(self, sample: Sample) -> tuple[Sample, Sample]:
        try:
            return sample.pair()
        except ValueError as error:
            raise UserError(
                f"sample {sample.key} of {sample.source!r} has {error}",
                where="data.mixture",
                fix="with data.loss_on 'preferences' give sources whose every conversation has one",
            ) from error

    def _sample(self, slot: _Slot, corrupt: dict[int, str]) -> Sample | None:
        """The slot's sample, or the next whole one of its source; None once there are too many damaged ones."""
        tries = 0
        while len(corrupt) <= self.max_corrupt:
            row = self.row(slot)
            try:
                return self.shards.read(
                    row,
                    image_repeats=self.data.image_repeats,
                    question_first=slot.question_first and not self.shards.is_caption[row],
                    label_questions=self.data.loss_on == "all_text",
                )
            except CorruptSampleError as error:
                corrupt[row] = str(error)
                tries += 1
                if tries == len(self.rows[slot.source]):
                    raise UserError(
                        f"every sample of {self.mixture.names[slot.source]!r} is damaged",
                        where=str(self.shards.folder),
                        fix="make the shards again",
                    ) from error
                slot = self.slot(slot.source, slot.position + 1)
        return None


class _Steps(Dataset[_Read]):
    """Optimizer steps by number, for one rank."""

    def __init__(self, shards: ShardSet, data: DataSettings, run: RunSettings, tokens_per_frame: int, rank: int, world_size: int) -> None:
        if run.batch_samples % world_size:
            raise UserError(
                f"{run.batch_samples} samples per step do not divide among {world_size} ranks",
                where="run.batch_samples",
                fix="make it a multiple of the number of ranks",
            )
        parts = [part for part in data.mixture if part.share > 0]
        rows = _source_rows(shards, "train", [part.source for part in parts])
        try:
            mixture = Mixture([part.source for part in parts], [part.share for part in parts], [len(r) for r in rows], run.seed)
        except ValueError as error:
            raise UserError(str(error), where="data.mixture", fix="change the shares") from error
        self.reader = _Reader(shards, data, mixture, rows, tokens_per_frame)
        self.run, self.rank, self.world_size = run, rank, world_size
        self.max_corrupt = self.reader.max_corrupt

    def __getitem__(self, index: int) -> _Read:
        try:
            return self.reader.pack(self.plan(index))
        except UserError as error:
            return _Read([], {}, (error.what, error.where, error.fix))

    def samples(self, step: int) -> Iterator[_Slot]:
        """The global batch of a step: a function of seed and step."""
        mixture, run = self.reader.mixture, self.run
        for number in range(step * run.batch_samples, (step + 1) * run.batch_samples):
            source, position = mixture.at(number)
            yield self.reader.slot(source, position)

    def plan(self, step: int) -> list[list[_Slot]]:
        """This rank's micro-batches of a step; only the dealing knows of ranks."""
        run, slots = self.run, list(self.samples(step))
        rows = [self.reader.row(slot) for slot in slots]
        costs = [(int(self.reader.shards.n_frames[row]), int(self.reader.shards.n_tokens[row])) for row in rows]
        per_rank = ceil(run.batch_samples // self.world_size / run.micro_batch_samples)
        bins = deal(costs, self.world_size * per_rank)
        return [[slots[index] for index in items] for items in bins[self.rank :: self.world_size]]


class _ShardFile:
    """An open tar, closed when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"a shard cannot be opened: {error.strerror}", where=str(path), fix="make the shards again") from error

    def read(self, offset: int, size: int) -> bytes:
        content = os.pread(self.descriptor, size, offset)
        if len(content) < size:
            raise CorruptSampleError("the shard ends within the sample")
        return content

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _parse(content: bytes) -> dict[str, Any]:
    try:
        return json.loads(content)
    except ValueError as error:
        raise CorruptSampleError(f"its JSON is damaged: {error}") from error


def _decode(jpeg: bytes, out: np.ndarray) -> None:
    """Decode into `out`, uint8 [S, S, 3]."""
    try:
        height, width = simplejpeg.decode_jpeg_header(jpeg)[:2]
        if (height, width) != out.shape[:2]:
            raise CorruptSampleError(f"a frame is {width}x{height}, not {out.shape[1]}x{out.shape[0]}")
        simplejpeg.decode_jpeg(jpeg, "RGB", buffer=out)
    except ValueError as error:
        raise CorruptSampleError(f"a frame is damaged: {error}") from error


def _source_rows(shards: ShardSet, split: Split, sources: list[str]) -> list[np.ndarray]:
    """Row numbers of each source. Raises UserError naming what there is if one has none."""
    rows = [shards.rows(split, source).index.to_numpy() for source in sources]
    missing = [source for source, numbers in zip(sources, rows, strict=True) if not len(numbers)]
    if missing:
        raise UserError(
            f"no {split} samples of {', '.join(map(repr, missing))}",
            where=f"data.mixture, shards {shards.folder}",
            fix=f"the shards have: {', '.join(shards.manifest.names(split)) or 'none'}",
        )
    return rows


def _without_corrupt(reads: Iterable[_Read], limit: int, folder: Path) -> Iterator[list[PackedBatch]]:
    """Pass batches on; log each damaged sample once, and raise UserError when there are more than `limit`."""
    seen: set[int] = set()
    for read in reads:
        if read.error:
            what, where, fix = read.error
            raise UserError(what, where=where, fix=fix)
        for row, reason in read.corrupt.items():
            if row not in seen:
                seen.add(row)
                logger.warning("skipped damaged sample %d of at most %d: row %d of %s: %s", len(seen), limit, row, folder / INDEX, reason)
        if len(seen) > limit:
            raise UserError(f"more than {limit} damaged samples", where=str(folder), fix="make the shards again")
        yield read.batches


def _ahead(function: Callable[[int], Item], numbers: Iterable[int], depth: int) -> Iterator[Item]:
    """Results of `function` in order, computed up to `depth` ahead by a thread."""
    remaining = iter(numbers)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as pool:
        waiting = deque(pool.submit(function, number) for number in islice(remaining, depth))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, number) for number in islice(remaining, 1))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


def _clean_processes() -> BaseContext:
    """Starts loader processes off a server that has this module and no threads: a fork of a process with CUDA or gloo can hang."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _as_it_is(item: Item) -> Item:
    return item
