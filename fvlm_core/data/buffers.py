"""Memory into which frames are decoded: reused, shared by the loader's processes, and page-locked if there is a GPU.

New memory costs a page fault per 4 KB, the result of a process a copy into shared memory, and a pageable batch another copy into
page-locked memory. Decoding frames where the GPU fetches them avoids all three.
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
"""Where Linux keeps shared memory."""


class FrameBuffers:
    """Buffers that each hold the frames of one micro-batch. A buffer is free again when the tensor handed out for it is freed."""

    def __init__(self, number: int, frames: int, side: int, *, shared: bool) -> None:
        """`shared`: use shared memory, for loader processes. Raises UserError if there is too little shared memory."""
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
        """Return the number of a free buffer, or None if all are in use: the batch then needs its own memory."""
        if not self._free:
            return None
        number, copied = self._free.popleft()
        if copied is not None:
            copied.synchronize()  # returns at once: it was recorded a step ago
        return number

    def give_back(self, number: int) -> None:
        """Free a buffer for which no tensor was handed out."""
        self._free.append((number, None))

    def tensor(self, number: int, frames: int) -> Tensor:
        """Return a buffer's first frames, uint8 [frames, S, S, 3].

        Keep this tensor, not just a view of it, as long as the frames are needed: the buffer is reused once it is freed.
        """
        tensor = self.memory[number, :frames]
        weakref.finalize(tensor, self._release, number).atexit = False
        return tensor

    def _release(self, number: int) -> None:
        copied = None
        if self.pinned:  # copies from it to the GPU may still be running
            copied = torch.cuda.Event()
            copied.record()
        self._free.append((number, copied))


def _check_shared_memory(needed: int) -> None:
    """Raise UserError in advance: running out of shared memory is a bus error in the middle of a run."""
    if SHARED_MEMORY.is_dir() and (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
        raise UserError(
            f"the loader's buffers need {needed / 1e9:.2f} GB of shared memory, {free / 1e9:.2f} GB are free",
            where=str(SHARED_MEMORY),
            fix="lower run.micro_batch.frames or data.workers, or give the container more (docker run --shm-size)",
        )


class Frames:
    """The frames of one micro-batch while they are decoded, one sample after another. A sample used several times is stored once."""

    def __init__(self, memory: np.ndarray) -> None:
        """`memory`: uint8 [F, S, S, 3] to decode into; replaced by a larger array if it is too small."""
        self.memory, self.used = memory, 0
        self.first: dict[int, int] = {}
        """Index of the first frame of each sample, by sample number."""

    def take(self, frames: int) -> np.ndarray:
        """Return memory for the frames of a sample."""
        end = self.used + frames
        if end > len(self.memory):
            larger = np.empty((end, *self.memory.shape[1:]), np.uint8)
            larger[: self.used] = self.memory[: self.used]
            self.memory = larger
        return self.memory[self.used : end]

    def keep(self, sample: int, frames: int) -> int:
        """Assign the memory taken last to a sample, unless it already has some; returns where its frames start."""
        start = self.first.setdefault(sample, self.used)
        if start == self.used:
            self.used += frames
        return start
