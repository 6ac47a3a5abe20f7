"""Where frames are decoded to: memory that is reused, shared by the loader's processes and page-locked where there is a GPU.

New memory costs a page fault per 4 KB, a process's result a copy into shared memory, and a pageable batch another into page-locked memory;
a frame that is decoded where the GPU fetches it from costs none of the three.
"""

import shutil
import weakref
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fvlm_core.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
"""Where Linux keeps it."""


class FrameBuffers:
    """So many buffers for the frames of one micro-batch each. One is free again when the tensor handed out for it is gone."""

    def __init__(self, number: int, frames: int, side: int, *, shared: bool) -> None:
        """`shared`: with other processes, to which the buffers' memory is sent. Raises UserError where there is too little of it."""
        if shared:
            _check_shared_memory(number * frames * side * side * 3)
        self.memory = torch.empty(number, frames, side, side, 3, dtype=torch.uint8)
        if shared:
            self.memory.share_memory_()
        self.pinned = torch.cuda.is_available() and self.memory.numel() > 0
        if self.pinned:
            pointer, runtime = self.memory.data_ptr(), torch.cuda.cudart()
            assert runtime is not None
            torch.cuda.check_error(runtime.cudaHostRegister(pointer, self.memory.numel(), 0))
            weakref.finalize(self, runtime.cudaHostUnregister, pointer)
        self._free: deque[tuple[int, torch.cuda.Event | None]] = deque((n, None) for n in range(number))

    def take(self) -> int | None:
        """The number of a free buffer; None where all are in use, and a batch needs memory of its own."""
        if not self._free:
            return None
        number, copied = self._free.popleft()
        if copied is not None:
            copied.synchronize()  # recorded a step ago: long past
        return number

    def give_back(self, number: int) -> None:
        """Let a buffer be used again that no tensor was handed out for."""
        self._free.append((number, None))

    def tensor(self, number: int, frames: int) -> Tensor:
        """A buffer's first frames, uint8 [frames, S, S, 3]. What is still to be read of them needs this tensor, not a view of it."""
        tensor = self.memory[number, :frames]
        weakref.finalize(tensor, self._release, number).atexit = False
        return tensor

    def _release(self, number: int) -> None:
        copied = None
        if self.pinned:  # copies to the GPU that were started from it may still run
            copied = torch.cuda.Event()
            copied.record()
        self._free.append((number, copied))


def _check_shared_memory(needed: int) -> None:
    """Too little of it is a bus error in the middle of a run."""
    if SHARED_MEMORY.is_dir() and (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
        raise UserError(
            f"the loader's buffers need {needed / 1e9:.2f} GB of shared memory, {free / 1e9:.2f} GB are free",
            where=str(SHARED_MEMORY),
            fix="lower run.micro_batch.frames or data.workers, or give the container more (docker run --shm-size)",
        )


class Frames:
    """The frames of one micro-batch while they are decoded, a sample's after the other's; each sample's once, whoever asks again."""

    def __init__(self, memory: np.ndarray) -> None:
        """`memory`: uint8 [F, S, S, 3] to decode into; where it is too small, larger memory takes its place."""
        self.memory, self.used = memory, 0
        self.first: dict[int, int] = {}
        """By sample number, where its frames start."""

    def take(self, frames: int) -> np.ndarray:
        """Memory for a sample's frames."""
        end = self.used + frames
        if end > len(self.memory):
            larger = np.empty((end, *self.memory.shape[1:]), np.uint8)
            larger[: self.used] = self.memory[: self.used]
            self.memory = larger
        return self.memory[self.used : end]

    def keep(self, sample: int, frames: int) -> int:
        """The frames that were taken last are those of a sample; returns where they start."""
        start = self.first.setdefault(sample, self.used)
        if start == self.used:
            self.used += frames
        return start
