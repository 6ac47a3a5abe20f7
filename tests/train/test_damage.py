"""Damaged samples are counted over all ranks and over restarts; a run goes on with few, and not with many."""

import logging
import shutil
from pathlib import Path

import pytest

from fvlm_core.config import Recipe
from fvlm_core.data.loader import train_steps
from fvlm_core.data.shard_io import CorruptSampleError
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.errors import UserError
from fvlm_core.train.__main__ import train
from tests.train.conftest import one_rank_then_stop, start, tiny_recipe


def damage(shards: ShardSet, key: str) -> None:
    """Overwrite the first frame of a sample, or its JSON where it has none."""
    entry = next(row for row in shards._table.to_pylist() if row["key"] == key)
    with (shards.folder / entry["shard"]).open("r+b") as stream:
        stream.seek(entry["frame_offsets"][0] if entry["frame_offsets"] else entry["json_offset"])
        stream.write(b"\0" * 40)


def keys(recipe: Recipe, *, rank: int = 0, world_size: int = 1, first_step: int = 0, steps: int) -> set[str]:
    """Keys of what a rank reads; raises where that alone has too many damaged samples."""
    run = recipe.run.model_copy(update={"steps": first_step + steps})
    read = train_steps(
        ShardSet(recipe.shards), recipe.data, run, tokens_per_frame=1, rank=rank, world_size=world_size, first_step=first_step
    )
    return {key for step in read for batch in step for key in batch.keys}


def test_counted_over_all_ranks(tmp_path: Path, shards: Path) -> None:
    """Each of two ranks meets one damaged sample, which is allowed; both together are one too many."""
    copy = shutil.copytree(shards, tmp_path / "shards")
    recipe = tiny_recipe(tmp_path / "run", copy, run__steps=1)
    first, second = (keys(recipe, rank=rank, world_size=2, steps=1) for rank in (0, 1))
    # of two sources: what takes the place of the one cannot be the other
    damage(ShardSet(copy), min(key for key in first - second if key.startswith("text")))
    damage(ShardSet(copy), min(key for key in second - first if key.startswith("gaze")))
    for rank in (0, 1):
        keys(recipe, rank=rank, world_size=2, steps=1)
    process = start(recipe, ranks=2)
    process.join(120)
    assert process.exitcode == 1
    assert not (recipe.output / "manifest.json").exists()


@pytest.mark.parametrize("stops", [[], [2]])
def test_counted_over_restarts(tmp_path: Path, shards: Path, stops: list[int]) -> None:
    """A run that was stopped between two damaged samples ends at the second one as one that was not."""
    copy = shutil.copytree(shards, tmp_path / "shards")
    recipe = tiny_recipe(tmp_path / "run", copy)
    early, late = (keys(recipe, first_step=step, steps=2) for step in (0, 2))
    damage(ShardSet(copy), min(early - late))
    damage(ShardSet(copy), min(late - early))
    for steps in stops:
        one_rank_then_stop(recipe, steps)
    with pytest.raises(UserError, match="more than 1 damaged samples"):
        train(recipe)
    assert not (recipe.output / "checkpoints" / "step-00000004").exists()


def test_a_damaged_clip_does_not_stop_a_run_that_reads_all_its_conversations(
    tmp_path: Path, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(shards, tmp_path / "shards")
    rows = ShardSet(copy).rows("train", "gaze_cell")
    key = rows["key"].value_counts().idxmax()
    damage(ShardSet(copy), key)
    with pytest.raises(CorruptSampleError):
        ShardSet(copy).read(int(rows.index[rows["key"] == key][0]), image_repeats=1)
    recipe = tiny_recipe(tmp_path / "run", copy, run__steps=12)
    with caplog.at_level(logging.WARNING):
        assert train(recipe).samples_seen == 12 * 8
    assert len([record for record in caplog.records if "skipped damaged sample" in record.message]) == 1
