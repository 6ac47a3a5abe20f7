"""The numbers of training: the loss is the mean over the global batch's labelled tokens, however the batch is split."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fvlm_core.config import LossSettings, Recipe
from fvlm_core.data.batch import Sample, Turn, pack
from fvlm_core.data.loader import train_steps, val_batches
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.model.build import build_model
from fvlm_core.train.__main__ import train
from fvlm_core.train.distributed import World
from fvlm_core.train.jobs import RunManifest
from fvlm_core.train.loop import Trainer
from fvlm_core.train.schedules import learning_rates
from tests.train.conftest import ONE_SAMPLE, losses, on_ranks, one_rank_then_stop, same_losses, tiny_recipe


def reference(recipe: Recipe, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """The same run in the plainest way: one batch a step, torch's AdamW, one group per parameter."""
    shards = ShardSet(recipe.shards)
    model = build_model(recipe.model, vocab_size=shards.manifest.vocab_size, seed=recipe.run.seed)
    groups = [
        {"params": [p], "role": model.role(n), "weight_decay": 0.0 if model.no_decay(n) else 0.01} for n, p in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), foreach=False, fused=False)
    means = []
    for step, batches in enumerate(train_steps(shards, recipe.data, recipe.run, tokens_per_frame=1, rank=0, world_size=1)):
        (batch,) = batches
        objective = model(batch, recipe.loss).objective / batch.n_labels
        means.append(objective.item())
        objective.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        rates = learning_rates(recipe.optimizer, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rates[group["role"]]
            for parameter in group["params"]:
                parameter.grad *= min(1.0, 1.0 / norm)
        optimizer.step()
        optimizer.zero_grad()
    return means, dict(model.named_parameters())


def test_equals_a_plain_loop(tmp_path: Path, shards: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", shards)
    manifest = train(recipe)
    means, parameters = reference(recipe, 6)
    assert losses(recipe)["train_loss"].tolist() == pytest.approx(means, abs=1e-5)
    saved = load_file(recipe.output / "model" / "model.safetensors")
    assert saved.keys() == parameters.keys()
    for name, parameter in parameters.items():
        mine, plain = saved[name], parameter.detach()
        if name.endswith("qkv.bias"):  # softmax does not see the keys' bias: its gradient is rounding noise, which Adam scales up
            mine, plain = (torch.cat([part.chunk(3)[0], part.chunk(3)[2]]) for part in (mine, plain))
        torch.testing.assert_close(mine, plain, atol=1e-5, rtol=0, msg=name)
    assert manifest.samples_seen == 6 * 8
    assert means[-1] < means[0]


@pytest.mark.slow(reason="two training processes, several times")
def test_ranks_and_accumulation_change_nothing(tmp_path: Path, shards: Path) -> None:
    """Over 20 steps, with micro-batches of one sample, so that some are text only and some ranks hold nothing but text."""
    whole, accumulated, ranked = (tiny_recipe(tmp_path / name, shards, run__steps=20) for name in ("whole", "accumulated", "ranked"))
    accumulated = accumulated.with_changes({"run.micro_batch": ONE_SAMPLE})
    ranked = ranked.with_changes({"run.micro_batch": ONE_SAMPLE})
    kinds = {
        tuple(sum(batch.shown_counts) > 0 for batch in batches)
        for rank in range(2)
        for batches in train_steps(ShardSet(shards), ranked.data, ranked.run, tokens_per_frame=1, rank=rank, world_size=2)
    }
    assert any(not kind[-1] for kind in kinds), "no rank synchronises after a micro-batch of text only"
    assert any(True in kind and False in kind for kind in kinds)
    one_rank_then_stop(ranked, steps=2)
    on_ranks(ranked, ranks=2)  # goes on from the one rank's checkpoint
    expected = train(whole)
    assert train(accumulated).counts == expected.counts
    manifest = RunManifest.read(ranked.output)
    assert manifest.counts == expected.counts
    assert manifest.resumed_from == [2]
    for recipe in (accumulated, ranked):
        same_losses(recipe, whole)


def test_micro_batch_without_labels(tmp_path: Path, shards: Path) -> None:
    """Adds nothing to the loss and nothing to the gradient."""
    recipe = tiny_recipe(tmp_path / "run", shards)
    trainer = Trainer(recipe, World(0, 1, torch.device("cpu")), "test", {}, has_wandb_key=False)
    trainer.go_to(None, trainer.state)
    (batch,) = next(trainer.batches)
    rows = trainer.shards.rows("train", "gaze_cell").index[:2]
    unlabelled = [trainer.shards.read(int(row), image_repeats=2) for row in rows]
    silent = pack(
        [Sample(s.key, s.source, s.frames, s.media, [Turn(t.question_ids, []) for t in s.turns]) for s in unlabelled], trainer.shards.chat
    )
    assert silent.n_labels == 0
    gradients = []
    for batches in ([batch], [silent, batch], [batch, silent]):
        sums = trainer._accumulate(batches, batch.n_labels)
        gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
        assert torch.isfinite(sums).all()
        trainer.optimizer.zero_grad()
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-7, rtol=1e-6, msg=name)


def test_step_without_any_label_is_no_nan(tmp_path: Path, shards: Path) -> None:
    trainer = Trainer(tiny_recipe(tmp_path / "run", shards), World(0, 1, torch.device("cpu")), "test", {}, has_wandb_key=False)
    trainer.go_to(None, trainer.state)
    sample = trainer.shards.read(int(trainer.shards.rows("train", "text").index[0]), image_repeats=1)
    silent = Sample(sample.key, sample.source, sample.frames, sample.media, [Turn(sample.turns[0].question_ids, [])])
    trainer.batches = iter([[pack([silent], trainer.shards.chat)]])
    loss, trouble = trainer.step()
    assert (loss, trouble) == (0.0, None)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_validation_is_weighted_by_tokens(tmp_path: Path, shards: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", shards, run__steps=1, run__micro_batch=ONE_SAMPLE)
    manifest = train(recipe)
    data = ShardSet(shards)
    model = build_model(recipe.model, vocab_size=data.manifest.vocab_size, seed=recipe.run.seed)
    model.load_state_dict(load_file(recipe.output / "model" / "model.safetensors"), strict=False)
    (batch,) = val_batches(data, recipe.run.eval_samples, recipe.data, tokens_per_frame=1, batch_samples=64)
    sums = model(batch, LossSettings()).sums
    expected = {name: float(value) / batch.n_labels for name, value in sums.items()}
    assert manifest.losses == pytest.approx(expected, abs=1e-5)
    assert manifest.final_loss == manifest.losses["fine2"]


def test_bf16_keeps_fp32_masters(tmp_path: Path, shards: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", shards, run__steps=2, run__precision="bf16")
    trainer = Trainer(recipe, World(0, 1, torch.device("cpu")), "test", {}, has_wandb_key=False)
    trainer.run()
    held = [*trainer.model.parameters(), *(part for state in trainer.optimizer.state.values() for part in state.values())]
    assert {tensor.dtype for tensor in held} == {torch.float32}
    means, _ = reference(recipe, 2)
    bf16 = losses(recipe)["train_loss"].tolist()
    assert bf16 == pytest.approx(means, rel=0.02)
    assert bf16 != means


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, shards: Path) -> None:
    plain = tiny_recipe(tmp_path / "plain", shards, run__steps=2)
    checkpointed = tiny_recipe(tmp_path / "checkpointed", shards, run__steps=2, run__gradient_checkpointing=True)
    train(plain)
    train(checkpointed)
    pd.testing.assert_frame_equal(losses(plain), losses(checkpointed), rtol=1e-5)


def test_budget_decides_the_steps(tmp_path: Path, shards: Path) -> None:
    full = train(tiny_recipe(tmp_path / "full", shards))
    recipe = tiny_recipe(tmp_path / "budget", shards, run__steps=None, run__budget_flops=full.flops / 2)
    half = train(recipe)
    assert half.flops == pytest.approx(full.flops / 2, rel=0.25)
    assert half.steps == 3


def test_a_budget_pays_for_what_is_trained(tmp_path: Path, shards: Path) -> None:
    """Of a run with frozen backbones, whose samples cost less."""
    frozen = {"optimizer__lr_vision": 0.0, "optimizer__lr_llm": 0.0, "run__eval_every": 100}
    full = train(tiny_recipe(tmp_path / "full", shards, **frozen))
    recipe = tiny_recipe(tmp_path / "budget", shards, run__steps=None, run__budget_flops=full.flops, **frozen)
    assert Trainer(recipe, World(0, 1, torch.device("cpu")), "test", {}, has_wandb_key=False).steps == full.steps
