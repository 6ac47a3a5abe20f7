"""Checkpoints are written while training goes on: what they hold, what a kill leaves, and what becomes of one that fails."""

import random
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from fvlm_core.exit_status import STOPPED
from fvlm_core.train import checkpoint
from fvlm_core.train.checkpoint import Checkpoints
from fvlm_core.train.distributed import World
from fvlm_core.train.loop import Trainer
from tests.train.conftest import tiny_recipe

ALONE = World(0, 1, torch.device("cpu"))


def of_run(folder: Path) -> Checkpoints:
    return Checkpoints(folder, ALONE, "a run")


def tensors(value: float, *, size: int = 200_000, number: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    return {"weights": {str(n): torch.full((size,), value + n) for n in range(number)}}


def save(checkpoints: Checkpoints, step: int, held: dict[str, dict[str, torch.Tensor]]) -> None:
    checkpoints.save(step, held, healthy_until=step, score=None, state={})


def held_at(checkpoints: Checkpoints, step: int) -> dict[str, dict[str, torch.Tensor]]:
    read = tensors(-1.0)
    checkpoints.load(step, read)
    return read


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The kernel refuses to let a file of this process grow beyond that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("file_bytes", [10**9, 10**6])
def test_holds_the_values_of_its_step_though_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int) -> None:
    """Also where a rank's part is several files, each with its digest."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", file_bytes)
    checkpoints, held = of_run(tmp_path), tensors(0.0)
    for step in (1, 2, 3):
        for tensor in held["weights"].values():
            tensor += 10.0
        save(checkpoints, step, held)
    checkpoints.wait()
    assert len(list((tmp_path / "step-00000003").glob("*.distcp"))) == (1 if file_bytes > 10**6 else 4)
    for step in (2, 3):
        assert {n: t[0].item() for n, t in held_at(checkpoints, step)["weights"].items()} == {str(n): 10.0 * step + n for n in range(4)}
    newest = checkpoints.newest()
    assert newest is not None
    assert {entry.path for entry in newest.files} == {path.name for path in (tmp_path / "step-00000003").iterdir()} - {"manifest.json"}


def save_until_killed(folder: Path, first: int) -> None:
    """What a training process does, without the training."""
    checkpoints = of_run(folder)
    checkpoints.clean()
    held = tensors(0.0)
    for step in count(first):
        for n, tensor in held["weights"].items():
            tensor.fill_(step + int(n))
        save(checkpoints, step, held)


def test_a_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    context = get_context("forkserver")
    context.set_forkserver_preload(["fvlm_core.train.loop"])
    newest = 0
    for _ in range(3):
        process = context.Process(target=save_until_killed, args=(tmp_path, newest + 1))
        process.start()
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(f"step-{newest + 2:08d}/manifest.json")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.random() * 0.1)
        process.kill()
        process.join()
        found = of_run(tmp_path).newest()
        assert found is not None
        assert found.step > newest
        newest = found.step
        assert {n: set(t.tolist()) for n, t in held_at(of_run(tmp_path), newest)["weights"].items()} == {
            str(n): {float(newest + n)} for n in range(4)
        }


@pytest.mark.parametrize("file_bytes", [10**9, 10**6])
def test_what_cannot_be_written_takes_no_good_ones_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int) -> None:
    """Whichever thread meets the error: torch's own keep it for themselves."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", file_bytes)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # as little as possible is noticed of those threads
    checkpoints = of_run(tmp_path)
    save(checkpoints, 1, tensors(1.0))
    checkpoints.wait()
    with files_up_to(100_000):
        save(checkpoints, 2, tensors(2.0))
        checkpoints.wait_on_this_rank()
    assert checkpoints.failed
    with pytest.raises(RuntimeError, match="the checkpoint of step 2 could not be written"):
        save(checkpoints, 3, tensors(3.0))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_step_that_is_saved_is_not_saved_again_by_a_stop(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would first delete it."""
    trainer = Trainer(tiny_recipe(tmp_path / "run", shards), ALONE, "test", {}, has_wandb_key=False)
    saved, saves = [], trainer.checkpoints.save

    def save_and_be_stopped(step: int, *held: Any, **options: Any) -> None:
        saves(step, *held, **options)
        saved.append(step)
        trainer.stop_requested = True

    monkeypatch.setattr(trainer.checkpoints, "save", save_and_be_stopped)
    with pytest.raises(SystemExit, match=str(STOPPED)):
        trainer.run()
    assert saved == [2]


def test_a_failed_save_ends_the_run_at_its_next_step(tmp_path: Path, shards: Path) -> None:
    trainer = Trainer(tiny_recipe(tmp_path / "run", shards), ALONE, "test", {}, has_wandb_key=False)
    trainer.go_to(None, trainer.state)
    trainer.step()
    with files_up_to(10_000):
        trainer._save()
        trainer.checkpoints.wait_on_this_rank()
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(RuntimeError, match="the checkpoint of step 1 could not be written"):
        trainer.step()
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.model.parameters(), strict=True))
