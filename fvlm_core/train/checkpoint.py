"""Checkpoints: written atomically, verified by checksums, and readable by any number of ranks.

A checkpoint is a folder such as `step-00000100` with the tensors (`torch.distributed.checkpoint`, each rank writes its part) and a
manifest, written last, with the sha256 of every file and the run's small state. It is written under a temporary name and then renamed, so a
killed process never leaves a partial checkpoint. Training only waits while tensors are copied; threads then write and hash the files, and a
failed save raises an error at the next step. The best checkpoint, the last two, and the rollback target are kept. The rollback target is
the newest checkpoint that enough healthy steps followed; while an alarm is pending, it is from before the alarm's first sign.
"""

import errno
import math
import os
import random
import re
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

from fvlm_core.errors import UserError
from fvlm_core.manifest import FILE_NAME as MANIFEST
from fvlm_core.manifest import FileEntry, Manifest, file_entries
from fvlm_core.train.distributed import World
from fvlm_core.train.divergence import MARGIN_STEPS

_TEMPORARY = ".making"
FILE_BYTES, MOST_FILES = 500_000_000, 8
"""Each rank writes files of about `FILE_BYTES`, at most `MOST_FILES`, with one thread per file."""
HASHERS = 8
"""Number of threads that hash a checkpoint's files."""
FULL_BYTES = 1_000_000
"""With less free space than this, a failed save is reported as a full disk."""

# torch warns that a single process saves alone, as `no_dist` requests. A permanent filter, because all threads share the filters.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class CheckpointManifest(Manifest):
    """Manifest of a checkpoint folder."""

    model_config = ConfigDict(ser_json_inf_nan="constants")  # before the first evaluation, the best loss is infinite

    step: int
    """Optimizer steps done; also the position of the data loader."""
    ranks: int
    """Number of ranks that wrote it. Any number of ranks can read it."""
    score: float | None
    """The recipe's `best` score of the validation losses at this step; None without an evaluation or while an alarm was pending."""
    state: dict[str, Any]
    """The run's small state (`fvlm_core.train.state.RunState`)."""


class Checkpoints:
    """The checkpoints of one run. All ranks must call every method, except `failed`, `wait_on_this_rank` and `files`."""

    def __init__(self, folder: Path, world: World, identity: str) -> None:
        """`identity`: hash of the run's settings and inputs; checkpoints with another one are ignored."""
        self.folder, self.world, self.identity = folder, world, identity
        self.group = world.new_group()
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.saving: Future[None] | None = None
        """The save in progress on this rank."""
        pinned = StagingOptions(use_shared_memory=False, use_async_staging=False)
        self.stager = DefaultStager(pinned) if world.device.type == "cuda" else None

    def save(self, step: int, tensors: dict[str, Any], *, healthy_until: int, score: float | None, state: dict[str, Any]) -> None:
        """Start to write the checkpoint of `step`; return once the tensors are copied. Waits for a save in progress first.

        When the checkpoint is complete, those that are no longer needed are deleted. `tensors`: nested dicts of tensors. `healthy_until`:
        the last step without a sign of divergence, which is before `step` while an alarm is pending. Raises RuntimeError if the previous
        save failed.
        """
        self.wait()
        flat = _flatten(tensors)
        temporary = self.folder / f"{_TEMPORARY}-{step:08d}"
        if self.world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.world.wait()
        files = min(MOST_FILES, 1 + sum(_local_bytes(tensor) for tensor in flat.values()) // FILE_BYTES)
        writing = async_save(
            flat,
            storage_writer=FileSystemWriter(temporary, thread_count=files),
            process_group=self.group,
            async_stager=self.stager,
            no_dist=self.world.size == 1,
        )
        assert isinstance(writing, Future)
        manifest = CheckpointManifest(
            name="checkpoint", settings_hash=self.identity, step=step, ranks=self.world.size, score=score, state=state
        )
        self.saving = self.pool.submit(self._complete, writing, temporary, manifest, healthy_until)

    @property
    def failed(self) -> bool:
        """Whether the latest save on this rank has failed with an error that `wait` will raise."""
        return self.saving is not None and self.saving.done() and self.saving.exception() is not None

    def wait(self) -> None:
        """Wait until the save in progress is complete. Raises RuntimeError on every rank if it failed on any."""
        if self.saving is None:
            return
        self.wait_on_this_rank()
        error, self.saving = self.saving.exception(), None
        if sum(self.world.sum([error is not None])):
            raise error or RuntimeError("a checkpoint could not be written on another rank")

    def wait_on_this_rank(self) -> None:
        """Wait until the save in progress on this rank has ended, successfully or not."""
        if self.saving is not None:
            wait([self.saving])

    def _complete(self, writing: "Future[Metadata]", temporary: Path, manifest: CheckpointManifest, healthy_until: int) -> None:
        """Wait until all ranks have written, then write the manifest and rename the folder. Runs in a thread."""
        try:
            metadata = writing.result()
            if self.world.rank == 0:
                _require_complete(metadata)
                manifest.model_copy(update={"files": _hashed(temporary)}).write(temporary)
                final = self._path(manifest.step)
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                _sync_folder(self.folder)
                self._prune(healthy_until)
        except (Exception, CheckpointException) as error:  # CheckpointException derives from BaseException
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            if shutil.disk_usage(self.folder).free < FULL_BYTES:  # torch only reports "unexpected pos"
                cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
            if self.world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)  # free the disk space
            raise RuntimeError(f"the checkpoint of step {manifest.step} could not be written") from cause

    def newest(self, *, up_to: int | None = None) -> CheckpointManifest | None:
        """Return the newest intact checkpoint (up to step `up_to`), or None. Damaged ones are reported and skipped."""
        self.wait()
        found = None
        if self.world.rank == 0:
            steps = sorted((step for step in self._steps() if up_to is None or step <= up_to), reverse=True)
            found = next((manifest for step in steps if (manifest := self._whole(step)) is not None), None)
        return self.world.broadcast(found)

    def best(self) -> CheckpointManifest | None:
        """Return the intact checkpoint with the lowest score (the earliest if equal), or None. Damaged ones are reported and deleted."""
        self.wait()
        found = None
        if self.world.rank == 0:
            for _, step in sorted((score, step) for step, score in self._scores().items()):
                found = self._whole(step)
                if found is not None:
                    break
                shutil.rmtree(self._path(step))
        return self.world.broadcast(found)

    def best_score(self) -> tuple[int, float]:
        """Return step and score of the checkpoint with the lowest score, intact or not; (0, infinity) if none has a score."""
        self.wait()
        scores = self._scores() if self.world.rank == 0 else {}
        score, step = min(((score, step) for step, score in scores.items()), default=(math.inf, 0))
        return self.world.broadcast((step, score))

    def load(self, step: int, tensors: dict[str, Any]) -> None:
        """Load the checkpoint of `step` into `tensors`, in place. Tensors that it lacks (RNG states of added ranks) are unchanged."""
        reader = FileSystemReader(self._path(step))
        held = reader.read_metadata().state_dict_metadata
        wanted = {name: tensor for name, tensor in _flatten(tensors).items() if name in held}
        load(wanted, storage_reader=reader, no_dist=self.world.size == 1)

    def drop_after(self, step: int) -> None:
        """Delete checkpoints of later steps than `step`."""
        self.wait()
        if self.world.rank == 0:
            for later in self._steps():
                if later > step:
                    shutil.rmtree(self._path(later))
        self.world.wait()

    def clean(self) -> None:
        """Delete incomplete checkpoints of a killed run."""
        if self.world.rank == 0:
            for leftover in self.folder.glob(f"{_TEMPORARY}-*"):
                shutil.rmtree(leftover)
        self.world.wait()

    def files(self, prefix: str) -> list[FileEntry]:
        """Return entries of all checkpoint files for the run's manifest, with paths under `prefix`, without hashing tensors again.

        Checkpoints without a readable manifest cannot be resumed from and are deleted.
        """
        entries = []
        for step in self._steps():
            path = f"{prefix}/{self._path(step).name}"
            try:
                listed = [*CheckpointManifest.read(self._path(step)).files, *file_entries(self._path(step), [MANIFEST])]
            except UserError:
                shutil.rmtree(self._path(step))
                continue
            entries += [entry.model_copy(update={"path": f"{path}/{entry.path}", "identity": False}) for entry in listed]
        return entries

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _steps(self) -> list[int]:
        matches = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in matches if match)

    def _whole(self, step: int) -> CheckpointManifest | None:
        manifest = CheckpointManifest.read_whole(self._path(step))
        if manifest is None or manifest.settings_hash != self.identity:
            print(f"checkpoint {self._path(step).name} is damaged or belongs to another run: skipped", flush=True)
            return None
        return manifest

    def _prune(self, healthy_until: int) -> None:
        """Delete checkpoints that are neither the best, nor among the last two or more, nor from the rollback target to `healthy_until`."""
        steps = self._steps()
        since, back = (max((step for step in steps if step <= last - MARGIN_STEPS), default=0) for last in (steps[-1], healthy_until))
        best = min(((score, step) for step, score in self._scores().items()), default=(math.inf, 0))[1]
        for step in steps:
            if (step < back or healthy_until < step < since) and step != best:
                shutil.rmtree(self._path(step))

    def _scores(self) -> dict[int, float]:
        return {step: score for step in self._steps() if (score := self._score(step)) is not None}

    def _score(self, step: int) -> float | None:
        try:
            return CheckpointManifest.read(self._path(step)).score
        except UserError:  # a damaged checkpoint cannot be the best
            return None


def _hashed(folder: Path) -> list[FileEntry]:
    """Hash a new checkpoint's files in parallel threads (hashing releases the GIL) and return their entries."""
    names = sorted(path.name for path in folder.iterdir())
    with ThreadPoolExecutor(HASHERS) as pool:
        return [entry for entries in pool.map(lambda name: file_entries(folder, [name]), names) for entry in entries]


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """Return the states of all random generators of this process, as tensors of fixed size."""
    keys, position = np.random.get_state()[1:3]  # ty: ignore[invalid-argument-type] -- a dict only where `legacy` is False
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
        "numpy": torch.from_numpy(np.append(keys, position).astype(np.int64)),
    }
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng(states: dict[str, Tensor], device: torch.device) -> None:
    """Set all random generators to the states returned by `rng_tensors`."""
    torch.set_rng_state(states["torch"])
    random.setstate((3, tuple(states["python"].tolist()), None))
    numpy_state = states["numpy"].numpy()
    np.random.set_state(("MT19937", numpy_state[:-1].astype(np.uint32), int(numpy_state[-1]), 0, 0.0))
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def _flatten(tensors: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts, joining keys with dots."""
    flat: dict[str, Any] = {}
    for key, value in tensors.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _local_bytes(tensor: Tensor) -> int:
    """Bytes of the part of a tensor that this rank holds."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def _require_complete(metadata: Metadata) -> None:
    """Raise RuntimeError if a part was not written: torch's writer threads do not propagate their errors."""
    parts = sum(len(held.chunks) if isinstance(held, TensorStorageMetadata) else 1 for held in metadata.state_dict_metadata.values())
    written = len(metadata.storage_data or {})
    if written != parts:
        raise RuntimeError(f"only {written} of {parts} parts were written")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
