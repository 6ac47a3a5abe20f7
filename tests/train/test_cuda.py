"""What only a GPU shows: the packed kernel, bf16, pinned batches, compiled training."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fvlm_core.config import COMPILED_PARTS, Recipe
from fvlm_core.data.loader import train_steps
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.model import attention
from fvlm_core.train.__main__ import train
from fvlm_core.train.jobs import RunManifest
from fvlm_core.train.nvml import gpu_readings
from fvlm_core.train.start import compile_parts, initial_model
from tests.train.conftest import losses, tiny_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def cuda_recipe(output: Path, shards: Path, **changes: Any) -> Recipe:
    """Heads of 16 features, as the kernel wants multiples of 8."""
    llm = {"shape": {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 96, "context": 512}}
    return tiny_recipe(output, shards, model__llm=llm, run__device="cuda", run__precision="bf16", run__steps=20, **changes)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_packed_kernel_is_used_and_right(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """Gradients against float64, which has neither the kernel nor anything compiled."""
    recipe, calls = cuda_recipe(tmp_path, shards), []
    kernel = attention.flash_attention

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args[0].dtype)
        return kernel(*args, **options)

    model = initial_model(recipe, ShardSet(shards)).cuda()
    exact = deepcopy(model).double()
    if compiled:
        compile_parts(model, COMPILED_PARTS)
    else:
        monkeypatch.setattr(attention, "flash_attention", counted)
    ((batch, *_), *_) = train_steps(ShardSet(shards), recipe.data, recipe.run, tokens_per_frame=1, rank=0, world_size=1)
    batch = batch.to(torch.device("cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        ours = model(batch, recipe.loss).objective
    ours.backward()
    assert set(calls) == (set() if compiled else {torch.bfloat16})
    expected = exact(batch, recipe.loss).objective
    expected.backward()
    torch.testing.assert_close(ours.double(), expected.double(), rtol=0.02, atol=0)
    for role in ("encoder", "connector", "llm"):
        pairs = zip(getattr(model, role).parameters(), getattr(exact, role).parameters(), strict=True)
        grads = [(p.grad.double().flatten(), q.grad.flatten()) for p, q in pairs if p.grad is not None and q.grad is not None]
        mine, right = (torch.cat(parts) for parts in zip(*grads, strict=True))
        assert F.cosine_similarity(mine, right, dim=0) > 0.99, role


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_come_in_pinned_memory(tmp_path: Path, shards: Path, workers: int) -> None:
    recipe = cuda_recipe(tmp_path, shards, data__workers=workers)
    ((batch, *_), *_) = train_steps(ShardSet(shards), recipe.data, recipe.run, tokens_per_frame=1, rank=0, world_size=1)
    assert batch.frames.is_pinned()
    assert batch.input_ids.is_pinned()


def test_compiled_training_equals_eager(tmp_path: Path, shards: Path) -> None:
    runs = {}
    for compiled in (False, True):
        runs[compiled] = cuda_recipe(tmp_path / str(compiled), shards, run__compile=compiled)
        train(runs[compiled])
        values = losses(runs[compiled])
        assert values["val_fine2"].iloc[-1] < values["val_fine2"].iloc[0]
    ends = [RunManifest.read(run.output).final_loss for run in runs.values()]
    assert ends[1] == pytest.approx(ends[0], rel=0.03)


def test_power_and_clock_are_read() -> None:
    readings = gpu_readings(torch.device("cuda"))
    assert readings["power_w"] > 5
    assert readings["sm_clock_mhz"] > 100
    assert gpu_readings(torch.device("cpu")) == {}
