"""Weights cast once a step in training: with several micro-batches, on one rank and replicated."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fvlm_core.train.distributed import World
from fvlm_core.train.loop import Trainer
from fvlm_core.train.parallelism import Replicated
from tests.train.conftest import ONE_SAMPLE, tiny_recipe


def gradients(folder: Path, shards: Path, kind: str) -> torch.Tensor:
    """Of a step of micro-batches of one sample; in the end every weight's copy is of the new weights."""
    changes = {"run__micro_batch": ONE_SAMPLE, "run__precision": "fp32" if kind == "fp32" else "bf16"}
    trainer = Trainer(tiny_recipe(folder / kind, shards, **changes), World(0, 1, torch.device("cpu")), "test", {}, has_wandb_key=False)
    if kind == "replicated":
        trainer.parallelism = Replicated(trainer.model, trainer.world)
    trainer.go_to(None, trainer.state)
    if kind in ("cast", "replicated"):
        trainer.model.casts.parts = frozenset(["encoder", "llm"])
        trainer.model.encoder.factored_gradients = True
    found: list[torch.Tensor] = []
    update = trainer.optimizer.step
    trainer.optimizer.step = lambda *args: found.append(flat(trainer)) or update(*args)
    for _ in range(2):
        trainer.step()
    trainer.parallelism.end()
    return found[1]


def flat(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("kind", ["cast", "replicated"])
def test_a_steps_gradients_are_as_exact_as_autocasts(tmp_path: Path, shards: Path, kind: str) -> None:
    """Against fp32, in the second step, whose weights are others than the first's."""
    if kind == "replicated":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        exact, plain, cast = (gradients(tmp_path, shards, one) for one in ("fp32", "bf16", kind))
    finally:
        if kind == "replicated":
            dist.destroy_process_group()
    errors = [float((one - exact).norm() / exact.norm()) for one in (plain, cast)]
    assert 0 < errors[1] < 1.3 * errors[0], errors
