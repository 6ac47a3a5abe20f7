"""The plan of a run: the samples of every step, and their division into micro-batches for each rank.

It depends only on the recipe's settings and the shards' index, so a resumed run, or one with another number of ranks or loader processes,
goes through the same global batches. No samples are read here; `fvlm_core.data.loader` does that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fvlm_core.config import DataSettings, MicroBatch, RunSettings
from fvlm_core.data.balancing import balance
from fvlm_core.data.mixture import BLOCK_SAMPLES, Mixture, hashed_bernoulli, sample_shares
from fvlm_core.data.rows import Split
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.errors import UserError

PLANNED_STEPS = 8
"""Dealt steps kept in a cache: each is requested once per micro-batch."""


@dataclass(frozen=True)
class PlannedSample:
    """One sample of the plan: its place in a source's sequence, and its question order."""

    source: int
    position: int
    """Position in the source's endless sequence."""
    question_first: bool


class MixedSamples:
    """The samples of a mixture; each source is an endless sequence."""

    def __init__(self, shards: ShardSet, data: DataSettings, split: Split, seed: int, *, tokens_per_frame: int) -> None:
        """Raises UserError if the shards lack a source, or if a share is too small."""
        self.shards, self.data = shards, data
        parts = [part for part in data.mixture if part.share > 0]
        names = [part.source for part in parts]
        self.rows = source_rows(shards, split, names)
        self.tokens = shards.sequence_tokens(image_repeats=data.image_repeats, tokens_per_frame=tokens_per_frame)
        self.shares = [part.share for part in parts]
        if data.shares_of == "tokens":
            self.shares = sample_shares(self.shares, [float(self.tokens[rows].mean()) for rows in self.rows])
        in_shards = [np.unique(shards.shard_numbers[rows], return_counts=True)[1].tolist() for rows in self.rows]
        try:
            self.mixture = Mixture(names, self.shares, in_shards, seed, window=data.shuffle_shards)
        except ValueError as error:
            raise UserError(str(error), where="data.mixture", fix="change the shares") from error

    def slot(self, source: int, position: int) -> PlannedSample:
        """Return the sample at a position of a source's endless sequence."""
        return PlannedSample(
            source, position, hashed_bernoulli(self.data.question_first, self.mixture.seed, self.mixture.names[source], position)
        )

    def row(self, slot: PlannedSample) -> int:
        """Return the row number of a planned sample."""
        return int(self.rows[slot.source][self.mixture.row(slot.source, slot.position)])

    def content(self, slot: PlannedSample) -> tuple[int, bool]:
        """Return a planned sample's row number, and whether its question comes first; equal for equal samples."""
        row = self.row(slot)
        return row, slot.question_first and not self.shards.is_caption[row] and self.shards.n_frames[row] > 0

    def costs(self, slots: Sequence[PlannedSample]) -> np.ndarray:
        """Return the cost of each sample, int64 [N, 2]: frames to encode, and tokens of its packed sequence (both, for a preference)."""
        rows = np.array([self.row(slot) for slot in slots], np.int64)
        answers = 2 if self.data.loss_on == "preferences" else 1
        return np.stack([self.shards.n_frames[rows].astype(np.int64), self.tokens[rows] * answers], axis=1)

    def in_order(self, slots: Sequence[PlannedSample], budget: MicroBatch) -> list[list[PlannedSample]]:
        """Split a sequence of samples into batches; a new one starts when the next sample would exceed a budget."""
        batches: list[list[PlannedSample]] = []
        held = np.zeros(2, np.int64)
        for slot, cost in zip(slots, self.costs(slots), strict=True):
            if not batches or ((held + cost) > (budget.frames, budget.tokens)).any():
                batches.append([])
                held = np.zeros(2, np.int64)
            batches[-1].append(slot)
            held = held + cost
        return batches


class Plan:
    """The steps of a run."""

    def __init__(self, shards: ShardSet, data: DataSettings, run: RunSettings, *, tokens_per_frame: int, world_size: int) -> None:
        """Raises UserError if the mixture does not fit the shards or the run, or if the batch does not divide among the ranks."""
        if run.batch_samples % world_size:
            raise UserError(
                f"{run.batch_samples} samples per step do not divide among {world_size} ranks",
                where="run.batch_samples",
                fix="make it a multiple of the number of ranks",
            )
        self.mixed = MixedSamples(shards, data, "train", run.seed, tokens_per_frame=tokens_per_frame)
        self.run, self.world_size, self.tokens_per_frame = run, world_size, tokens_per_frame
        self._check_epochs(data)
        self._dealt = lru_cache(maxsize=PLANNED_STEPS)(self._deal)

    def samples(self, step: int) -> Iterator[PlannedSample]:
        """Yield the global batch of a step. It depends only on seed and step."""
        for number in range(step * self.run.batch_samples, (step + 1) * self.run.batch_samples):
            yield self.mixed.slot(*self.mixed.mixture.at(number))

    def micro_batches(self, step: int) -> list[list[list[PlannedSample]]]:
        """Return the same samples by `[rank][micro-batch]`. Every rank has the same number of micro-batches, and none is empty."""
        return self._dealt(step)

    def epochs(self, steps: int) -> dict[str, float]:
        """Return how many epochs of each source this many steps go through, by its average share."""
        mixture, samples = self.mixed.mixture, steps * self.run.batch_samples
        shares = [count / BLOCK_SAMPLES for count in mixture.counts]
        return {name: samples * share / size for name, share, size in zip(mixture.names, shares, mixture.sizes, strict=True)}

    def _deal(self, step: int) -> list[list[list[PlannedSample]]]:
        slots, budget = list(self.samples(step)), self.run.micro_batch
        dealt = balance(self.mixed.costs(slots) / (budget.frames, budget.tokens), self.world_size)
        return [[[slots[index] for index in items] for items in rank] for rank in dealt]

    def _check_epochs(self, data: DataSettings) -> None:
        if self.run.steps is None:
            return
        for name, epochs in self.epochs(self.run.steps).items():
            most = next(part.max_epochs for part in data.mixture if part.source == name)
            if most is not None and epochs > most:
                raise UserError(
                    f"{self.run.steps} steps go through {name!r} {epochs:.2f} times, more than {most:g}",
                    where="data.mixture, max_epochs",
                    fix="lower its share or the number of steps, or allow more epochs",
                )


def source_rows(shards: ShardSet, split: Split, sources: list[str]) -> list[np.ndarray]:
    """Return the row numbers of each source. Raises UserError, listing the sources that exist, if one has none."""
    rows = [shards.row_numbers(split, source) for source in sources]
    missing = [source for source, numbers in zip(sources, rows, strict=True) if not len(numbers)]
    if missing:
        raise UserError(
            f"no {split} samples of {', '.join(map(repr, missing))}",
            where=f"data.mixture, shards {shards.folder}",
            fix=f"the shards have: {', '.join(shards.manifest.names(split)) or 'none'}",
        )
    return rows
