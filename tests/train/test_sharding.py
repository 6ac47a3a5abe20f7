"""Sharded over two ranks (FSDP2) is the same training as on one, whichever way it is started, stopped and continued."""

import shutil
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fvlm_core.config import Recipe
from fvlm_core.train.__main__ import train
from fvlm_core.train.distributed import World
from fvlm_core.train.jobs import RunManifest
from fvlm_core.train.loop import Trainer
from fvlm_core.train.parallelism import Replicated
from tests.train.conftest import ONE_SAMPLE, losses, on_ranks, one_rank_then_stop, same_losses, tiny_recipe

pytestmark = pytest.mark.slow(reason="two training processes, several times")


def same_weights(recipe: Recipe, other: Recipe, *, atol: float) -> None:
    mine, theirs = (load_file(r.output / "model" / "model.safetensors") for r in (recipe, other))
    assert {name: tensor.shape for name, tensor in mine.items()} == {name: tensor.shape for name, tensor in theirs.items()}
    for name, tensor in mine.items():
        assert tensor.dtype == torch.float32
        if not name.endswith("qkv.bias"):  # the keys' bias has a gradient of rounding noise, which Adam scales up
            torch.testing.assert_close(tensor, theirs[name], atol=atol, rtol=0, msg=name)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Recipe:
    recipe = tiny_recipe(tmp_path_factory.mktemp("one") / "run", shards)
    train(recipe)
    return recipe


def continued_from(recipe: Recipe, step: int) -> None:
    """As if the run had been killed after the checkpoint of `step`."""
    (recipe.output / "manifest.json").unlink()
    for checkpoint in (recipe.output / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


def test_two_sharded_ranks_equal_one(tmp_path: Path, shards: Path, one_rank: Recipe) -> None:
    """With micro-batches of one sample: a rank may hold text only while the other runs the encoder. It goes on from one rank's
    checkpoint; from its own, one rank goes on, and two that are not sharded."""
    recipe = tiny_recipe(tmp_path / "run", shards, run__sharding="fsdp2", run__micro_batch=ONE_SAMPLE)
    one_rank_then_stop(recipe, steps=2)
    on_ranks(recipe, ranks=2)
    assert RunManifest.read(recipe.output).resumed_from == [2]
    assert RunManifest.read(recipe.output).counts == RunManifest.read(one_rank.output).counts
    same_losses(recipe, one_rank)
    same_weights(recipe, one_rank, atol=1e-5)
    for ranks in (1, 2):
        other = recipe.with_changes({"output": str(tmp_path / str(ranks)), "run.sharding": "ddp"})
        shutil.copytree(recipe.output, other.output)
        continued_from(other, 4)
        train(other) if ranks == 1 else on_ranks(other, ranks)
        assert RunManifest.read(other.output).resumed_from == [2, 4]
        same_losses(other, one_rank)
        same_weights(other, one_rank, atol=1e-5)


def test_diverges_and_goes_back_as_one_rank_does(tmp_path: Path, shards: Path) -> None:
    """A norm that is not finite is seen on every rank; the start is reloaded into the shards, and what is frozen stays so."""
    changes = {"optimizer__lr_vision": 1e30, "run__steps": 8, "optimizer__clip_norm": 0.1}
    one = tiny_recipe(tmp_path / "one", shards, **changes)
    sharded = tiny_recipe(tmp_path / "sharded", shards, **changes, run__sharding="fsdp2")
    expected = train(one)
    on_ranks(sharded, ranks=2)
    manifest = RunManifest.read(sharded.output)
    assert [(d.step, d.back_to, d.froze) for d in manifest.divergences] == [(d.step, d.back_to, d.froze) for d in expected.divergences]
    assert [d.froze for d in manifest.divergences] == ["vision"]
    same_losses(sharded, one)


def test_bf16_is_as_exact_as_unsharded(tmp_path: Path, shards: Path) -> None:
    """To rounding the same as DDP, with gradient checkpointing: what runs in bf16 does not depend on where the weights are kept."""
    changes = {"run__steps": 3, "run__precision": "bf16", "run__gradient_checkpointing": True}
    recipes = {sharding: tiny_recipe(tmp_path / sharding, shards, **changes, run__sharding=sharding) for sharding in ("ddp", "fsdp2")}
    for recipe in recipes.values():
        on_ranks(recipe, ranks=2)
    fp32 = tiny_recipe(tmp_path / "fp32", shards, run__steps=3)
    train(fp32)
    same_losses(recipes["fsdp2"], recipes["ddp"])
    same_weights(recipes["fsdp2"], recipes["ddp"], atol=1e-5)
    bf16, exact = (losses(recipe)["train_loss"].tolist() for recipe in (recipes["fsdp2"], fp32))
    assert bf16 == pytest.approx(exact, rel=0.02)
    assert bf16 != exact


def test_nothing_in_the_spread_outlives_its_end(shards: Path, tmp_path: Path) -> None:
    """DistributedDataParallel's reducer must not be the last to hold the process group: freeing it can hang a finished run."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trainer = Trainer(tiny_recipe(tmp_path / "run", shards), World(0, 1, torch.device("cpu")), "test", {}, has_wandb_key=False)
        trainer.parallelism = Replicated(trainer.model, trainer.world)
        trainer.go_to(None, trainer.state)
        trainer.step()
        parallel = weakref.ref(trainer.parallelism.parallel)
        trainer.parallelism.end()
        assert parallel() is None
    finally:
        dist.destroy_process_group()
