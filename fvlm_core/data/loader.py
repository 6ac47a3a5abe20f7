"""From shards to packed batches: reads the samples of the plan ahead of the training step.

`train_steps` yields the micro-batches of one rank for each optimizer step; `val_batches` yields a fixed validation set in a fixed order.
A damaged sample is logged, counted and replaced by the next one of its source, up to a limit (`fvlm_core.data.damage`).
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count, islice
from math import ceil
from multiprocessing import forkserver, parent_process, popen_forkserver, resource_tracker
from multiprocessing.context import BaseContext, ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fvlm_core.config import DataSettings, MicroBatch, RunSettings
from fvlm_core.data.ahead import ahead
from fvlm_core.data.batch import PackedBatch
from fvlm_core.data.buffers import FrameBuffers
from fvlm_core.data.damage import Damage
from fvlm_core.data.mixture import apportion
from fvlm_core.data.plan import MixedSamples, Plan, PlannedSample, source_rows
from fvlm_core.data.reader import Read, Reader
from fvlm_core.data.rows import Split
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.errors import UserError

AHEAD_STEPS = 2
"""Training steps to read ahead."""
AHEAD_BATCHES = 2
"""Validation batches to read ahead."""
STAGED_STEPS = 32
"""Steps whose shards are copied ahead, if shards are staged."""
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
    """Yield this rank's micro-batches of every optimizer step from `first_step` to `run.steps` (endless if that is None).

    Damaged samples are counted in `damage`; the caller checks it after each step, over all ranks. A step has no batches if this rank
    found too many. If `damage` is None, the damaged samples of this rank are checked here.

    Every rank gets the same number of micro-batches, and none is empty. They keep to the budgets of `run.micro_batch`, except for a single
    sample above a budget, and for damaged samples that are replaced by larger ones. Preferences come as pairs, chosen and rejected in
    turn. A batch's frames are in memory that is reused once the batch is freed. Raises UserError if the mixture does not fit the shards,
    the batch does not divide among the ranks, or too many samples are damaged.
    """
    shards = shards.staged(data.staging)
    plan = Plan(shards, data, run, tokens_per_frame=tokens_per_frame, world_size=world_size)
    depth = AHEAD_STEPS * len(plan.micro_batches(first_step)[rank])
    depth = max(2, ceil(depth / data.workers)) * data.workers if data.workers else depth
    # twice: the steps read ahead, plus the current step and the previous one, whose copies to the GPU may still be running
    buffers = FrameBuffers(2 * depth, _most_frames(plan), shards.manifest.frame_px, shared=data.workers > 0)
    items = _Items(plan, rank, buffers.memory)
    wanted = (
        _Item(step, micro, buffers.take()) for step in _steps(run, first_step) for micro in range(len(plan.micro_batches(step)[rank]))
    )
    reads = _reads(items, wanted, workers=data.workers, depth=depth)
    counted = _counted((read.placed(buffers) for read in reads), damage or items.reader.damage(), check=damage is None)
    with _StagedAhead(plan) as staged:
        for step in _steps(run, first_step):
            staged.past(step)
            batches = [batch for batch in islice(counted, len(plan.micro_batches(step)[rank])) if batch is not None]
            yield batches if len(batches) == len(plan.micro_batches(step)[rank]) else []


def distinct_batches(
    shards: ShardSet, data: DataSettings, run: RunSettings, *, tokens_per_frame: int, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, PackedBatch]]:
    """Yield every sample of all steps of `train_steps` once, in numbered batches within `run.micro_batch`.

    A sample shown in both question orders comes in both, and samples that may replace damaged ones are included. Only batches whose
    number is `wanted` are read. Raises UserError as `train_steps` does.
    """
    assert run.steps is not None
    shards = shards.staged(data.staging)
    plan = Plan(shards, data, run, tokens_per_frame=tokens_per_frame, world_size=1)
    mixed, reader = plan.mixed, Reader(plan.mixed, tokens_per_frame)
    planned = [slot for step in range(run.steps) for slot in plan.samples(step)]
    last = {slot.source: slot.position for slot in planned}
    spare = [mixed.slot(source, position + 1 + n) for source, position in last.items() for n in range(reader.most_damaged_rows())]
    slots = {mixed.content(slot): slot for slot in [*planned, *spare]}
    batches = mixed.in_order([slots[key] for key in sorted(slots)], run.micro_batch)
    numbers = [number for number in range(len(batches)) if wanted(number)]
    reads = ahead(lambda number: reader.pack(batches[number]), numbers, AHEAD_BATCHES)
    for number, batch in zip(numbers, _counted(reads, reader.damage(), check=True), strict=True):
        assert batch is not None
        yield number, batch


def val_batches(
    shards: ShardSet,
    n_samples: int,
    data: DataSettings,
    *,
    tokens_per_frame: int,
    batch_samples: int | None = None,
    budget: MicroBatch | None = None,
    rank: int = 0,
    world_size: int = 1,
    damage: Damage | None = None,
) -> Iterator[PackedBatch]:
    """Yield this rank's share (every `world_size`th batch) of `n_samples` validation samples, mixed as `data.held_out` says.

    There are fewer samples if a source has fewer. A batch has `batch_samples` samples, or as many as `budget` allows. Preferences come as
    pairs, chosen and rejected in turn. The samples and their order depend on nothing else. `damage` works as in `train_steps`. Raises
    UserError if a source of the mixture has no validation samples.
    """
    data = data.held_out
    shards = shards.staged(data.staging)
    mixed = MixedSamples(shards, data, "val", VAL_SEED, tokens_per_frame=tokens_per_frame)
    reader = Reader(mixed, tokens_per_frame)
    slots = []
    for source, wanted in enumerate(apportion(mixed.shares, n_samples)):
        for position in range(min(wanted, mixed.mixture.sizes[source])):
            slots.append(mixed.slot(source, position))
    batches = mixed.in_order(slots, budget) if budget else []
    if batch_samples:
        batches = [slots[start : start + batch_samples] for start in range(0, len(slots), batch_samples)]
    own = batches[rank::world_size]
    workers = min(data.workers, len(own))
    reads = _reads(_Lists(mixed, tokens_per_frame, own), range(len(own)), workers=workers, depth=AHEAD_BATCHES * max(1, workers))
    yield from (batch for batch in _counted(reads, damage or reader.damage(), check=damage is None) if batch is not None)


def damage_count(shards: ShardSet, data: DataSettings, split: Split, known: Iterable[int] = ()) -> Damage:
    """Return a count of damaged samples for several ranks to share.

    It covers the samples that `train_steps` reads or, with `data.held_out`, those of `val_batches`.
    """
    rows = source_rows(shards, split, [part.source for part in data.mixture if part.share > 0])
    return Damage(len(np.unique(shards.sample_numbers[np.concatenate(rows)])), shards.folder, known)


class _Item(NamedTuple):
    """A request to a loader process."""

    step: int
    micro_batch: int
    buffer: int | None
    """Number of the buffer for its frames; None gives them new memory."""


class _Items(Dataset[Read]):
    """Micro-batches of one rank, by step and number."""

    def __init__(self, plan: Plan, rank: int, buffers: torch.Tensor) -> None:
        self.plan, self.rank, self.buffers = plan, rank, buffers
        self.reader = Reader(plan.mixed, plan.tokens_per_frame)

    def __reduce__(self) -> tuple:
        """Loader processes rebuild the plan: its tables are larger than the inputs that they are made from."""
        plan = self.plan
        return _items, (plan.mixed.shards, plan.mixed.data, plan.run, plan.tokens_per_frame, plan.world_size, self.rank, self.buffers)

    def __getitem__(self, index: _Item) -> Read:
        memory = None if index.buffer is None else self.buffers[index.buffer].numpy()
        try:
            read = self.reader.pack(self.plan.micro_batches(index.step)[self.rank][index.micro_batch], memory)
        except UserError as error:
            return Read(None, {}, (error.what, error.where, error.fix))
        if read.batch is not None and index.buffer is not None and read.in_buffer is not None:
            read = replace(read, batch=replace(read.batch, frames=read.batch.frames[:0].clone()))  # the frames stay in the buffer
        return replace(read, buffer=index.buffer)


def _items(
    shards: ShardSet, data: DataSettings, run: RunSettings, tokens_per_frame: int, world_size: int, rank: int, buffers: torch.Tensor
) -> _Items:
    return _Items(Plan(shards, data, run, tokens_per_frame=tokens_per_frame, world_size=world_size), rank, buffers)


class _Lists(Dataset[Read]):
    """Batches of given samples, by number. The samples are sent to loader processes with it."""

    def __init__(self, mixed: MixedSamples, tokens_per_frame: int, batches: list[list[PlannedSample]]) -> None:
        self.mixed, self.tokens_per_frame, self.batches = mixed, tokens_per_frame, batches
        self.reader = Reader(mixed, tokens_per_frame)

    def __reduce__(self) -> tuple:
        """Loader processes rebuild the mixture: its tables are larger than the inputs that they are made from."""
        mixed = self.mixed
        return _lists, (mixed.shards, mixed.data, self.tokens_per_frame, self.batches)

    def __getitem__(self, index: int) -> Read:
        try:
            return self.reader.pack(self.batches[index])
        except UserError as error:
            return Read(None, {}, (error.what, error.where, error.fix))


def _lists(shards: ShardSet, data: DataSettings, tokens_per_frame: int, batches: list[list[PlannedSample]]) -> _Lists:
    mixed = MixedSamples(shards, data, "val", VAL_SEED, tokens_per_frame=tokens_per_frame)
    return _Lists(mixed, tokens_per_frame, batches)


class _StagedAhead:
    """Copies the shards of upcoming steps in a thread, if shards are staged."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.staging = plan, plan.mixed.shards.staging
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="staging") if self.staging else None
        self.next_step = 0

    def __enter__(self) -> "_StagedAhead":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def past(self, step: int) -> None:
        """Copy ahead from `step`, which the run has reached."""
        last = self.plan.run.steps
        if self.pool is None:
            return
        self.next_step = max(self.next_step, step)
        while self.next_step < step + STAGED_STEPS and (last is None or self.next_step < last):
            self.pool.submit(self._stage, self.next_step)
            self.next_step += 1

    def _stage(self, step: int) -> None:
        assert self.staging is not None
        mixed = self.plan.mixed
        for shard in sorted({int(mixed.shards.shard_numbers[mixed.row(slot)]) for slot in self.plan.samples(step)}):
            self.staging.stage(mixed.shards.shard_names[shard])


def _steps(run: RunSettings, first: int) -> Iterable[int]:
    return count(first) if run.steps is None else range(first, run.steps)


def _most_frames(plan: Plan) -> int:
    """Maximum number of frames in a micro-batch."""
    mixed, run = plan.mixed, plan.run
    largest = max(int(mixed.shards.n_frames[rows].max()) for rows in mixed.rows)
    return max(largest, min(run.micro_batch.frames, largest * (run.batch_samples // plan.world_size)))


def _counted(reads: Iterable[Read], damage: Damage, *, check: bool) -> Iterator[PackedBatch | None]:
    """Pass batches on and count damaged samples; with `check`, raise UserError when there are too many."""
    for read in reads:
        if read.error:
            what, where, fix = read.error
            raise UserError(what, where=where, fix=fix)
        damage.add(read.corrupt)
        if check:
            damage.check()
        yield read.batch


def _reads(items: Dataset[Read], wanted: Iterable[Any], *, workers: int, depth: int) -> Iterable[Read]:
    """Return the items in order, read up to `depth` ahead by loader processes, or by a thread if `workers` is 0.

    With a GPU, they are in page-locked memory.
    """
    pinned = torch.cuda.is_available()
    if not workers:
        return ahead((lambda item: items[item].pin_memory()) if pinned else items.__getitem__, wanted, depth)
    return DataLoader(
        items,
        batch_size=None,
        sampler=wanted,
        num_workers=workers,
        prefetch_factor=depth // workers,
        multiprocessing_context=loader_processes(),
        pin_memory=pinned,
        collate_fn=identity,
    )


class _Started(popen_forkserver.Popen):
    """Terminated by SIGKILL: at exit, Python sends SIGTERM to children that still run and waits for them, but these block it."""

    terminate = popen_forkserver.Popen.kill


class _LoaderProcess(ForkServerProcess):
    """A process that ends when its parent ends."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _Started:  # noqa: N802 (Python's name)
        return _Started(process_obj)

    def run(self) -> None:
        Thread(target=_end_after_parent, daemon=True).start()
        super().run()


class _LoaderProcesses(ForkServerContext):
    Process = _LoaderProcess


def loader_processes() -> BaseContext:
    """Return a context that forks loader processes off a server that has imported this module and has no threads.

    A fork of a process with CUDA or gloo can hang. Loader processes block SIGTERM: launchers send it to every process of a run, which
    then needs data for one more step before it saves and stops.
    """
    context = _LoaderProcesses()
    context.set_forkserver_preload([__name__])
    resource_tracker.ensure_running()  # otherwise the server starts it, which unblocks SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()  # a child inherits the blocked signals of its parent
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _end_after_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def identity(item: Item) -> Item:
    return item
