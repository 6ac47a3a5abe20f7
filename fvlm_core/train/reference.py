"""The frozen reference of a DPO run: the log-probabilities that the model it starts with gives to every answer, computed once.

They are kept in the run's folder, `reference/`: numbered tables, each of a fixed set of samples and so the same whoever computes
it, and a manifest once all are there. A run that was killed goes on with the tables that are missing.
"""

import hashlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fvlm_core.config import Recipe, RunSettings
from fvlm_core.data.batch import PackedBatch
from fvlm_core.data.loader import distinct_batches, val_batches
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.errors import UserError
from fvlm_core.manifest import Manifest, file_entries, write_atomically
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.progress import Progress
from fvlm_core.train.distributed import World
from fvlm_core.train.jobs import REFERENCE_FOLDER


class Reference:
    """Log-probabilities by sample."""

    def __init__(self, table: dict[str, list[float]]) -> None:
        """`table`: by `sample_ids`, one value per pass."""
        self.table = table

    def log_probs(self, batch: PackedBatch) -> Tensor:
        """float64 [passes, N] on CPU. Raises UserError for a sample that the reference has not seen."""
        try:
            return torch.tensor([self.table[name] for name in sample_ids(batch)], dtype=torch.float64).T
        except KeyError as error:
            raise UserError(
                "a sample has no reference log-probability: another one of the step is damaged, or its shards have changed",
                where=f"{REFERENCE_FOLDER}/ of the run",
                fix="make the shards again and start the run anew",
            ) from error


def sample_ids(batch: PackedBatch) -> list[str]:
    """A name for each sample of a batch in the host's memory: its key, which stands for its frames, and its tokens in their order."""
    ids, labels = batch.input_ids.split(batch.lengths), batch.labels.split(batch.lengths)
    return [
        hashlib.blake2b(key.encode() + tokens.numpy().tobytes() + targets.numpy().tobytes(), digest_size=16).hexdigest()
        for key, tokens, targets in zip(batch.keys, ids, labels, strict=True)
    ]


def make_reference(model: FoveatedVLM, shards: ShardSet, recipe: Recipe, run: RunSettings, world: World, identity: str) -> Reference:
    """Compute (or read) what `model` says of all samples that the run will meet; for all ranks to call.

    `model` is the one that the run starts with, complete on every rank; `run` says how many steps there are.
    """
    folder, name = recipe.output / REFERENCE_FOLDER, f"reference-{recipe.name}"
    done = None
    if world.rank == 0:
        done = Manifest.read_whole(folder)
        done = done if done is not None and done.settings_hash == identity else None
        if done is None and (folder / "manifest.json").exists():  # damaged
            shutil.rmtree(folder)
    done = world.share(done)
    if done is None:
        _compute(model, shards, recipe, run, world, folder)
        world.wait()
        if world.rank == 0:
            files = file_entries(folder, ["*.parquet"])
            Manifest(name=name, settings_hash=identity, files=files, counts={"samples": len(_read(folder))}).write(folder)
        world.wait()
    return Reference(_read(folder))


@torch.no_grad()
def _compute(model: FoveatedVLM, shards: ShardSet, recipe: Recipe, run: RunSettings, world: World, folder: Path) -> None:
    model.eval()
    progress = Progress(recipe.output, run.steps or 1)
    for path, batch in _batches(shards, recipe, run, world, folder):
        with torch.autocast(world.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            sums = model(batch.to(world.device), recipe.loss, by_sample=True).sums
        log_probs = -torch.stack([sums[name] for name in recipe.passes]).double().cpu().numpy()
        columns: dict[str, Any] = {"id": sample_ids(batch)} | dict(zip(recipe.passes, log_probs, strict=True))
        content = io.BytesIO()
        pq.write_table(pa.table(columns), content)
        write_atomically(path, content.getvalue())
        if world.rank == 0:
            progress.update(0, note=f"reference {path.stem}")
    model.train()


def _batches(shards: ShardSet, recipe: Recipe, run: RunSettings, world: World, folder: Path) -> Iterator[tuple[Path, PackedBatch]]:
    """This rank's share of the batches whose tables are not there yet, and the tables' paths."""
    data, k = recipe.data, recipe.model.tokens_per_frame
    # the table names that fixed batches get; which rank computes one does not matter
    held_out = val_batches(
        shards,
        run.eval_samples,
        data,
        tokens_per_frame=k,
        budget=run.micro_batch,
        rank=world.rank,
        world_size=world.size,
    )
    for number, batch in enumerate(held_out):
        path = folder / f"val-{world.rank + number * world.size:06d}.parquet"
        if not path.is_file():
            yield path, batch

    def path_of(number: int) -> Path:
        return folder / f"train-{number:06d}.parquet"

    def wanted(number: int) -> bool:
        return number % world.size == world.rank and not path_of(number).is_file()

    for number, batch in distinct_batches(shards, data, run, tokens_per_frame=k, wanted=wanted):
        yield path_of(number), batch


def _read(folder: Path) -> dict[str, list[float]]:
    table: dict[str, list[float]] = {}
    for path in sorted(folder.glob("*.parquet")):
        ids, *values = (column.to_pylist() for column in pq.read_table(path).columns)
        table |= {name: list(row) for name, row in zip(ids, zip(*values, strict=True), strict=True)}
    return table
