"""Reads planned samples and packs them into micro-batches.

Frames are decoded directly into the memory from which they are copied to the GPU. Conversations about the same sample share its frames,
which are decoded once. A damaged sample is replaced by the next one of its source.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from fvlm_core.data.batch import PackedBatch, Sample, StoredFrames, pack
from fvlm_core.data.buffers import FrameBuffers, Frames
from fvlm_core.data.damage import Corrupt, Damage
from fvlm_core.data.plan import MixedSamples, PlannedSample
from fvlm_core.data.shard_io import CorruptSampleError
from fvlm_core.data.shard_set import Bytes
from fvlm_core.errors import UserError


@dataclass(frozen=True)
class Read:
    """A micro-batch that was read. It carries the damaged samples found, because it may come from another process."""

    batch: PackedBatch | None
    """None if too many samples are damaged."""
    corrupt: dict[int, Corrupt]
    """By sample number."""
    error: tuple[str, str, str] | None = None
    """What, where and fix of a UserError: torch cannot re-raise one from a loader process."""
    buffer: int | None = None
    """Number of the buffer provided for the frames."""
    in_buffer: int | None = None
    """Number of frames in the buffer; None: the batch has its own memory."""

    def pin_memory(self) -> "Read":
        """Return it with its batch in page-locked memory, for copies to a GPU that overlap computation (DataLoader calls this)."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())

    def placed(self, buffers: FrameBuffers) -> "Read":
        """Return it with the frames that are in its buffer. An unused buffer is given back."""
        if self.buffer is None:
            return self
        if self.batch is None or self.in_buffer is None:
            buffers.give_back(self.buffer)
            return self
        return replace(self, batch=replace(self.batch, frames=buffers.tensor(self.buffer, self.in_buffer)))


class Reader:
    """Reads planned samples and packs them."""

    def __init__(self, mixed: MixedSamples, tokens_per_frame: int) -> None:
        self.shards, self.data, self.mixed, self.tokens_per_frame = mixed.shards, mixed.data, mixed, tokens_per_frame
        self.conversations = np.unique(self.shards.sample_numbers[np.concatenate(mixed.rows)], return_counts=True)[1]
        self.max_damaged = self.damage().limit

    def damage(self) -> Damage:
        """Return a new count of damaged samples, for the samples that are read here."""
        return Damage(len(self.conversations), self.shards.folder)

    def most_damaged_rows(self) -> int:
        """Return the maximum number of rows that the allowed number of damaged samples can have."""
        return int(np.sort(self.conversations)[-self.max_damaged :].sum())

    def pack(self, slots: list[PlannedSample], memory: np.ndarray | None = None) -> Read:
        """Read and pack a micro-batch, with its frames in `memory` (uint8 [F, S, S, 3]) if they fit."""
        corrupt: dict[int, Corrupt] = {}
        side = self.shards.manifest.frame_px
        if memory is None:
            memory = np.empty((int(self.mixed.costs(slots)[:, 0].sum()), side, side, 3), np.uint8)
        frames = Frames(memory)
        contents = self.shards.fetch(self.mixed.row(slot) for slot in slots)
        samples: list[Sample] = []
        first: list[int] = []
        for slot in slots:
            found = self._sample(slot, frames, contents, corrupt)
            if found is None:
                return Read(None, corrupt)
            sample, start = found
            both = self._pair(sample) if self.data.loss_on == "preferences" else (sample,)
            samples.extend(both)
            first.extend([start] * len(both))
        stored = StoredFrames(torch.from_numpy(frames.memory[: frames.used]), first)
        batch = pack(samples, self.shards.chat, tokens_per_frame=self.tokens_per_frame, stored=stored)
        return Read(batch, corrupt, in_buffer=frames.used if frames.memory is memory else None)

    def _pair(self, sample: Sample) -> tuple[Sample, Sample]:
        try:
            return sample.pair()
        except ValueError as error:
            raise UserError(
                f"sample {sample.key} of {sample.source!r} has {error}",
                where="data.mixture",
                fix="with data.loss_on 'preferences', use only sources in which every conversation has one",
            ) from error

    def _sample(
        self, slot: PlannedSample, frames: Frames, contents: dict[int, Bytes], corrupt: dict[int, Corrupt]
    ) -> tuple[Sample, int] | None:
        """Return the slot's sample, or the next intact one of its source, and where its frames start; None if too many are damaged."""
        tries = 0
        while len(corrupt) <= self.max_damaged:
            row = self.mixed.row(slot)
            number = int(self.shards.sample_numbers[row])
            known = frames.first.get(number)
            n_frames = int(self.shards.n_frames[row])
            try:
                sample = self.shards.read(
                    row,
                    image_repeats=self.data.image_repeats,
                    question_first=slot.question_first and not self.shards.is_caption[row],
                    label_questions=self.data.loss_on == "all_text",
                    content=contents.get(row),
                    frames=frames.take if known is None else frames.memory[known : known + n_frames],
                )
                return sample, frames.keep(number, n_frames)
            except CorruptSampleError as error:
                corrupt.setdefault(number, Corrupt(row, str(error)))
                tries += 1
                if tries == len(self.mixed.rows[slot.source]):
                    raise UserError(
                        f"every sample of {self.mixed.mixture.names[slot.source]!r} is damaged",
                        where=str(self.shards.folder),
                        fix="make the shards again",
                    ) from error
                slot = self.mixed.slot(slot.source, slot.position + 1)
        return None
