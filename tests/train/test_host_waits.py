"""A training step asks the device for its numbers once: for what is logged and decided on."""

from collections.abc import Callable
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fvlm_core.train.distributed import World
from fvlm_core.train.loop import Trainer
from tests.train.conftest import ONE_SAMPLE, tiny_recipe

WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique", "bincount", "repeat_interleave.Tensor")
"""Operations whose result or shape depends on a tensor's numbers: on a GPU the host waits for them."""


class Waits(TorchDispatchMode):
    """The operations that would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        self.seen += [name] if any(name == one or name.startswith(f"{one}.") for one in WAITING) else []
        return func(*args, **(kwargs or {}))


def counted(fetch: Callable[[Tensor], Any], fetched: list[int]) -> Callable[[Tensor], Any]:
    """`fetch`, of which is noted how many numbers it fetches of what the device would hold; the loader's thread has its own."""

    def call(tensor: Tensor) -> Any:
        if tensor.is_floating_point() and current_thread() is main_thread():
            fetched.append(tensor.numel())
        return fetch(tensor)

    return call


@pytest.mark.parametrize("changes", [{}, {"run__micro_batch": ONE_SAMPLE}, {"run__precision": "bf16"}], ids=str)
def test_one_transfer_a_step(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    """Forward, backward, gradient norms, clipping and AdamW, over videos, images and texts."""
    trainer = Trainer(tiny_recipe(tmp_path / "run", shards, **changes), World(0, 1, torch.device("cpu")), "test", {}, has_wandb_key=False)
    trainer.go_to(None, trainer.state)
    trainer.step()
    fetched: list[int] = []
    for name in ("tolist", "item"):
        monkeypatch.setattr(Tensor, name, counted(getattr(Tensor, name), fetched))
    with Waits() as waits:
        trainer.step()
    assert waits.seen == []
    # objective, passes, entropy; norms of the three roles and their norm
    assert fetched == [2 + len(trainer.objective.names) + 4]
    with Waits() as waits:
        float(torch.ones(2).sum())
        torch.ones(2).nonzero()
    assert len(waits.seen) == 2
