"""The frozen reference of a DPO run: log-probabilities of all answers under the initial model, computed once.

They are stored in the run's folder `reference/` as numbered tables, with a manifest once all are complete. Each table covers a fixed set of
samples, so it does not matter which rank computes it. A killed run resumes with the missing tables.
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


class ReferenceLogProbs:
    """Reference log-probabilities by sample."""

    def __init__(self, table: dict[str, list[float]]) -> None:
        """`table`: log-probabilities by id (see `sample_ids`), one per pass."""
        self.table = table

    def log_probs(self, batch: PackedBatch) -> Tensor:
        """Return the log-probabilities of a batch, float64 [passes, N] on CPU. Raises UserError for an unknown sample."""
        try:
            return torch.tensor([self.table[name] for name in sample_ids(batch)], dtype=torch.float64).T
        except KeyError as error:
            raise UserError(
                "a sample has no reference log-probability: another sample of the step is damaged, or the shards have changed",
                where=f"{REFERENCE_FOLDER}/ of the run",
                fix="make the shards again and start the run anew",
            ) from error


def sample_ids(batch: PackedBatch) -> list[str]:
    """Return an id for each sample of a batch on CPU: a hash of its key (which identifies its frames), tokens and labels."""
    ids, labels = batch.input_ids.split(batch.lengths), batch.labels.split(batch.lengths)
    return [
        hashlib.blake2b(key.encode() + tokens.numpy().tobytes() + targets.numpy().tobytes(), digest_size=16).hexdigest()
        for key, tokens, targets in zip(batch.keys, ids, labels, strict=True)
    ]


def make_reference(
    model: FoveatedVLM, shards: ShardSet, recipe: Recipe, run: RunSettings, world: World, identity: str
) -> ReferenceLogProbs:
    """Compute, or read, the log-probabilities of all samples that the run will use. All ranks must call this.

    `model`: the run's initial model, complete on every rank. `run`: run settings, with the number of steps.
    """
    folder, name = recipe.output / REFERENCE_FOLDER, f"reference-{recipe.name}"
    done = None
    if world.rank == 0:
        done = Manifest.read_whole(folder)
        done = done if done is not None and done.settings_hash == identity else None
        if done is None and (folder / "manifest.json").exists():  # damaged
            shutil.rmtree(folder)
    done = world.broadcast(done)
    if done is None:
        _compute(model, shards, recipe, run, world, folder)
        world.wait()
        if world.rank == 0:
            files = file_entries(folder, ["*.parquet"])
            Manifest(name=name, settings_hash=identity, files=files, counts={"samples": len(_read(folder))}).write(folder)
        world.wait()
    return ReferenceLogProbs(_read(folder))


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
    """Yield this rank's share of the batches whose tables are missing, with the tables' paths."""
    data, k = recipe.data, recipe.model.tokens_per_frame
    # number tables by batch, so that any rank can compute any table
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
