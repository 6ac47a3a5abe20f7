"""Tiny shards for these tests, and recipes that train a very small model on them in a second."""

import logging
import os
import socket
import sys
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from fvlm_core.config import Recipe
from fvlm_core.exit_status import STOPPED
from fvlm_core.train.__main__ import train
from fvlm_core.train.distributed import World
from fvlm_core.train.folder import input_digests
from fvlm_core.train.loop import Trainer
from infra import forked_ranks
from infra.start import run
from tests.tiny import tiny_shards

# torch logs every tensor it saves, and pytest would keep it all
logging.getLogger("c10d-NullHandler-dcp_logger").disabled = True


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_shards(tmp_path_factory.mktemp("train") / "shards", clips=8)


ONE_SAMPLE = {"frames": 1, "tokens": 1}
"""`run.micro_batch` with which every sample is a micro-batch of its own."""


def tiny_recipe(output: Path, shards: Path, **changes: Any) -> Recipe:
    """A recipe of 6 steps; `changes` are dotted paths with two underscores for the dot: `run__steps=3`."""
    recipe = Recipe.from_values(
        {
            "name": "tiny",
            "output": output,
            "shards": shards,
            "model": {
                "vision": {"shape": {"width": 16, "layers": 2, "heads": 2}, "frame_px": 42},
                "llm": {"shape": {"width": 24, "layers": 2, "heads": 2, "kv_heads": 1, "mlp_width": 48, "context": 512}},
            },
            "data": {
                "mixture": [
                    {"source": "gaze_cell", "share": 0.4},
                    {"source": "gaze_image", "share": 0.2},
                    {"source": "text", "share": 0.4},
                ],
                "image_repeats": 2,
            },
            "optimizer": {"lr_connector": 3e-3, "lr_vision": 1e-3, "lr_llm": 2e-3, "warmup_steps": 2},
            "run": {
                "steps": 6,
                "batch_samples": 8,
                "eval_every": 1,
                "eval_samples": 8,
                "checkpoint_every": 2,
                "wandb": "disabled",
                "device": "cpu",
            },
        },
        where="tests",
    )
    return recipe.with_changes({key.replace("__", "."): value for key, value in changes.items()})


def on_ranks(recipe: Recipe, ranks: int) -> None:
    """Train on several ranks as torchrun would start them."""
    context = imported()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [context.Process(target=_rank, args=(recipe, environment | {"RANK": str(r), "LOCAL_RANK": str(r)})) for r in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * ranks


def _rank(recipe: Recipe, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    train(recipe)


def imported() -> ForkServerContext:
    """Starts processes off one that has imported what a training run does."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["fvlm_core.train.preload"])
    return context


def start(recipe: Recipe, ranks: int = 0) -> ForkServerProcess:
    """Train in a process of its own, `python -m fvlm_core.train RECIPE`; with ranks under torchrun's launcher (`infra.forked_ranks`)."""
    path = recipe.output.with_suffix(".yaml")
    recipe.to_yaml(path)
    command = ["fvlm_core.train", str(path)]
    return program([forked_ranks.__name__, str(ranks), *command] if ranks else command)


def program(command: list[str], output: str | None = None) -> ForkServerProcess:
    """`python -m MODULE ARGUMENTS` as a process of its own, which prints into the file or terminal `output`."""
    process = imported().Process(target=_program, args=(command, output))
    process.start()
    return process


def _program(command: list[str], output: str | None) -> None:
    if output is not None:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_NOCTTY), sys.stdout.fileno())
        os.environ |= {"TERM": "xterm", "COLUMNS": "120"}
    run(command)


def one_rank_then_stop(recipe: Recipe, steps: int, *, evaluated: bool = True) -> None:
    """The first steps of a run that a SIGTERM ends, each `evaluated` or none."""
    inputs = input_digests(recipe)
    trainer = Trainer(recipe, World(0, 1, torch.device("cpu")), recipe.identity(inputs), inputs, has_wandb_key=False)
    trainer.go_to(None, trainer.state)
    for _ in range(steps):
        trainer.step()
        if evaluated:
            trainer._evaluate()
    trainer.stop_requested = True
    with pytest.raises(SystemExit, match=str(STOPPED)):
        trainer.step()


def losses(recipe: Recipe) -> pd.DataFrame:
    return pd.read_csv(recipe.output / "metrics.csv", index_col="step").filter(regex="^(val_|train_|grad_norm_|label_tokens|entropy)")


def same_losses(recipe: Recipe, other: Recipe) -> None:
    """Equal to 1e-5 at every evaluation point, each pass, training and validation; gradient norms in relation to their size."""
    mine, theirs = losses(recipe), losses(other)
    pd.testing.assert_frame_equal(mine.filter(regex="^(val|train)_"), theirs.filter(regex="^(val|train)_"), atol=1e-5, rtol=0)
    pd.testing.assert_frame_equal(mine, theirs, atol=1e-5, rtol=1e-4)
