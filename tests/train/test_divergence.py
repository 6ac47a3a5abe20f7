"""Training that leaves the road goes back and freezes; noise does not count."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fvlm_core.errors import UserError
from fvlm_core.train.__main__ import train
from fvlm_core.train.distributed import World
from fvlm_core.train.divergence import HISTORY_STEPS, NONFINITE_STEPS, SPIKE_STEPS, Watch
from fvlm_core.train.loop import Trainer
from tests.train.conftest import tiny_recipe


def test_exploding_vision_is_frozen(tmp_path: Path, shards: Path) -> None:
    """At lr 1e30 the first update destroys the encoder: back to the start, and on without training it."""
    recipe = tiny_recipe(tmp_path / "run", shards, optimizer__lr_vision=1e30, run__steps=12)
    manifest = train(recipe)
    (divergence,) = manifest.divergences
    assert (divergence.froze, divergence.back_to) == ("vision", 0)
    assert divergence.step <= 1 + NONFINITE_STEPS
    rows = pd.read_csv(recipe.output / "metrics.csv")
    assert rows["step"].tolist() == list(range(1, 13))
    assert np.isfinite(rows["val_loss"]).all()
    assert (rows["lr_vision"] == 0).all()
    frozen = tiny_recipe(tmp_path / "frozen", shards, optimizer__lr_vision=0.0, run__steps=12)
    assert train(frozen).final_loss == manifest.final_loss  # what is left is exactly a run with the encoder frozen


def test_goes_back_to_a_checkpoint_not_to_the_start(tmp_path: Path, shards: Path) -> None:
    """A healthy run whose weights are damaged on the way: its checkpoints from before are good."""
    recipe = tiny_recipe(tmp_path / "run", shards, run__steps=20)
    trainer = Trainer(recipe, World(0, 1, torch.device("cpu")), "test", {}, has_wandb_key=False)
    take_step, damaged = trainer.step, []

    def step_that_damages_once() -> tuple[float, str | None]:
        if trainer.state.step == 13 and not damaged:
            damaged.append(True)
            with torch.no_grad():
                trainer.model.encoder.norm.weight.fill_(math.nan)
        return take_step()

    trainer.step = step_that_damages_once
    manifest = trainer.run()
    (divergence,) = manifest.divergences
    assert divergence.froze == "vision"
    assert divergence.back_to == 10  # of every second step; 12 is too near
    assert manifest.steps == 20
    assert math.isfinite(manifest.final_loss)


def test_gives_up_when_all_is_frozen(tmp_path: Path, shards: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", shards, optimizer__lr_connector=1e30, run__steps=12)
    with pytest.raises(UserError, match=r"diverges at step .*vision, llm_lower"):
        train(recipe)
    assert not (recipe.output / "manifest.json").exists()


def test_start_from_broken_weights_gives_up(tmp_path: Path, shards: Path) -> None:
    first = tiny_recipe(tmp_path / "first", shards, run__steps=1)
    train(first)
    weights = first.output / "model" / "model.safetensors"
    broken = load_file(weights) | {"encoder.norm.weight": torch.full((16,), math.nan)}
    save_file(broken, weights)
    recipe = tiny_recipe(tmp_path / "run", shards).model_copy(update={"init_from": first.output})
    with pytest.raises(UserError, match="diverges at step 1"):
        train(recipe)


@given(seed=st.integers(0, 2**32), noise=st.floats(0.0, 0.15), level=st.floats(0.1, 10.0))
def test_noise_is_no_divergence(seed: int, noise: float, level: float) -> None:
    rng, watch = np.random.default_rng(seed), Watch()
    for step in range(300):
        loss = level * (1 + math.exp(-step / 50)) * math.exp(rng.normal(0, noise))
        assert watch.observe(loss, math.exp(rng.normal(0, 1)), rng.uniform(0.01, 2.0)) is None


@given(level=st.floats(0.1, 10.0), rise=st.floats(3.0, 1e6))
def test_a_lasting_spike_is_and_a_short_one_is_not(level: float, rise: float) -> None:
    watch = Watch()
    for _ in range(HISTORY_STEPS):
        assert watch.observe(level, 1.0, 1.0) is None
    for _ in range(SPIKE_STEPS - 1):
        assert watch.observe(level * rise, 1.0, 1.0) is None
    assert watch.observe(level, 1.0, 1.0) is None
    signs = [watch.observe(level * rise, 1.0, 1.0) for _ in range(SPIKE_STEPS)]
    assert signs[:-1] == [None] * (SPIKE_STEPS - 1)
    assert "running mean" in str(signs[-1])


def test_other_signs() -> None:
    watch = Watch()
    for _ in range(HISTORY_STEPS):
        watch.observe(1.0, 1.0, 2.0)
    assert [watch.observe(math.nan, 1.0, 2.0) for _ in range(NONFINITE_STEPS)][-1] is not None
    watch.nonfinite = 0
    assert [watch.observe(1.0, 1e4, 2.0) for _ in range(SPIKE_STEPS)][-1] is not None
    watch.norm_spikes = 0
    assert any(watch.observe(1.0, 1.0, 1e-5) for _ in range(30))
    assert Watch.model_validate(watch.model_dump(mode="json")) == watch
