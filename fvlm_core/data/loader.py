"""From shards to packed batches: which samples make up a step, read ahead of it.

`train_steps` yields what one rank computes in each optimizer step, `val_batches` a fixed validation set in a fixed order.
A damaged sample is logged, counted and replaced by the next of its source, up to a limit (`fvlm_core.data.damage`).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count, islice
from math import ceil
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fvlm_core.config import DataSettings, RunSettings
from fvlm_core.data.batch import PackedBatch, Sample, pack
from fvlm_core.data.damage import Corrupt, Damage
from fvlm_core.data.mixture import Mixture, apportion, coin, deal
from fvlm_core.data.rows import Split
from fvlm_core.data.shard_set import CorruptSampleError, ShardSet
from fvlm_core.errors import UserError

PREFETCH_STEPS = 2
"""Steps read ahead: by a thread without loader processes, by each of them with."""
VAL_SEED = 0
"""The validation set is the same for every run, whatever its seed."""

Item = TypeVar("Item")


def train_steps(
    shards: ShardSet,
    data: DataSettings,
    run: RunSettings,
    *,
    tokens_per_frame: int,
    rank: int,
    world_size: int,
    first_step: int = 0,
    damage: Damage | None = None,
) -> Iterator[list[PackedBatch]]:
    """This rank's micro-batches of every optimizer step from `first_step` to `run.steps` (without end where that is None).

    Damaged samples are counted in `damage`, for the caller to check, after each step, over all ranks; a step has no batches where
    this rank met too many. Where it is None, those of this rank are checked here.

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
    yield from _counted(reads, damage or steps.reader.damage(), check=damage is None)


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
    spare = [reader.slot(source, position + 1 + n) for source, position in last.items() for n in range(reader.most_damaged_rows())]
    slots = {reader.content(slot): slot for slot in [*planned, *spare]}
    ordered = [slots[key] for key in sorted(slots)]
    chunks = [ordered[start : start + run.micro_batch_samples] for start in range(0, len(ordered), run.micro_batch_samples)]
    numbers = [number for number in range(len(chunks)) if wanted(number)]
    reads = _ahead(lambda number: reader.pack([chunks[number]]), numbers, PREFETCH_STEPS)
    for number, (batch,) in zip(numbers, _counted(reads, reader.damage(), check=True), strict=True):
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
    damage: Damage | None = None,
) -> Iterator[PackedBatch]:
    """`n_samples` validation samples mixed as `data.held_out` says (fewer where a source has fewer), every `world_size`th batch of them.

    Preferences come as pairs, chosen and rejected in turn. The samples and their order depend on nothing else. `damage` as in
    `train_steps`. Raises UserError if a source of the mixture has no validation samples.
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
    for batch in _counted(reads, damage or reader.damage(), check=damage is None):
        yield from batch


def damage_count(shards: ShardSet, data: DataSettings, split: Split, known: Iterable[int] = ()) -> Damage:
    """A count of damaged samples for several ranks to share: of what `train_steps` or (with `data.held_out`) `val_batches` read."""
    rows = _source_rows(shards, split, [part.source for part in data.mixture if part.share > 0])
    return Damage(len(np.unique(shards.sample_numbers[np.concatenate(rows)])), shards.folder, known)


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
    corrupt: dict[int, Corrupt]
    """By sample number."""
    error: tuple[str, str, str] | None = None
    """What, where and fix of a UserError: torch cannot raise one again out of a loader process."""

    def pin_memory(self) -> "_Read":
        """With its batches in page-locked memory, from where they travel to a GPU while it computes (DataLoader calls this)."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


class _Reader:
    """Reads planned samples and packs them."""

    def __init__(self, shards: ShardSet, data: DataSettings, mixture: Mixture, rows: list[np.ndarray], tokens_per_frame: int) -> None:
        self.shards, self.data, self.mixture, self.rows, self.tokens_per_frame = shards, data, mixture, rows, tokens_per_frame
        self.conversations = np.unique(shards.sample_numbers[np.concatenate(rows)], return_counts=True)[1]
        self.max_damaged = self.damage().limit

    def damage(self) -> Damage:
        """A count of the damaged samples among those that are read here."""
        return Damage(len(self.conversations), self.shards.folder)

    def most_damaged_rows(self) -> int:
        """How many rows as many damaged samples as are allowed can have."""
        return int(np.sort(self.conversations)[-self.max_damaged :].sum())

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
        corrupt: dict[int, Corrupt] = {}
        batches = []
        for slots in micro_batches:
            samples = [sample for slot in slots if (sample := self._sample(slot, corrupt))]
            if self.data.loss_on == "preferences":
                samples = [one for sample in samples for one in self._pair(sample)]
            if len(corrupt) > self.max_damaged:
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

    def _sample(self, slot: _Slot, corrupt: dict[int, Corrupt]) -> Sample | None:
        """The slot's sample, or the next whole one of its source; None once there are too many damaged ones."""
        tries = 0
        while len(corrupt) <= self.max_damaged:
            row = self.row(slot)
            try:
                return self.shards.read(
                    row,
                    image_repeats=self.data.image_repeats,
                    question_first=slot.question_first and not self.shards.is_caption[row],
                    label_questions=self.data.loss_on == "all_text",
                )
            except CorruptSampleError as error:
                corrupt.setdefault(int(self.shards.sample_numbers[row]), Corrupt(row, str(error)))
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


def _counted(reads: Iterable[_Read], damage: Damage, *, check: bool) -> Iterator[list[PackedBatch]]:
    """Pass batches on and count damaged samples; with `check`, raise UserError when there are too many."""
    for read in reads:
        if read.error:
            what, where, fix = read.error
            raise UserError(what, where=where, fix=fix)
        damage.add(read.corrupt)
        if check:
            damage.check()
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
