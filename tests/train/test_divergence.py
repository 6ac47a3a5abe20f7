"""Training that diverges goes back and freezes; noise does not count."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fvlm_core.data.batch import PackedBatch
from fvlm_core.errors import UserError
from fvlm_core.train.__main__ import train
from fvlm_core.train.distributed import World
from fvlm_core.train.divergence import HISTORY_STEPS, MARGIN_STEPS, NONFINITE_STEPS, SPIKE_STEPS, DivergenceDetector
from fvlm_core.train.jobs import RunManifest
from fvlm_core.train.loop import Trainer
from tests.train.conftest import tiny_recipe


def test_exploding_vision_is_frozen(tmp_path: Path, shards: Path) -> None:
    """At lr 1e30 the first update destroys the encoder: back to the start, and on without training it."""
    recipe = tiny_recipe(tmp_path / "run", shards, optimizer__lr_vision=1e30, run__steps=12, run__eval_every=6)
    manifest = train(recipe)
    (divergence,) = manifest.divergences
    assert (divergence.froze, divergence.back_to) == ("vision", 0)
    assert divergence.step <= 1 + NONFINITE_STEPS
    rows = pd.read_csv(recipe.output / "metrics.csv")
    assert rows["step"].tolist() == [6, 12]
    assert np.isfinite(rows["val_loss"]).all()
    assert (rows["lr_vision"] == 0).all()
    frozen = tiny_recipe(tmp_path / "frozen", shards, optimizer__lr_vision=0.0, run__steps=12, run__eval_every=6)
    assert train(frozen).final_loss == manifest.final_loss  # what is left is exactly a run with the encoder frozen


def test_goes_back_to_a_checkpoint_not_to_the_start(tmp_path: Path, shards: Path) -> None:
    """A healthy run whose weights are damaged on the way: its checkpoints from before are good."""
    recipe = tiny_recipe(tmp_path / "run", shards, run__steps=20, run__eval_every=10)
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


def test_a_run_that_is_compared_ends_by_it(tmp_path: Path, shards: Path) -> None:
    """Frozen and continued it would be another experiment: it ends with what it had, and says why."""
    recipe = tiny_recipe(tmp_path / "run", shards, optimizer__lr_vision=1e30, run__steps=12, run__on_divergence="end")
    manifest = train(recipe)
    (divergence,) = manifest.divergences
    assert (divergence.froze, divergence.back_to) == ("", 0)
    assert "nan" in divergence.reason
    assert manifest.steps == 0
    assert math.isfinite(manifest.final_loss)
    assert manifest.problems(recipe.output) == []


@pytest.mark.parametrize("checkpoint_every", [3, 10])
def test_a_collapse_goes_back_to_before_it_and_not_to_the_start(tmp_path: Path, shards: Path, checkpoint_every: int) -> None:
    """Checkpoints made while the alarm is pending take no good one's place: neither the way back nor the best."""
    recipe = tiny_recipe(tmp_path / "run", shards, run__steps=60, run__checkpoint_every=checkpoint_every, run__eval_every=10)
    trainer = Trainer(recipe, World(0, 1, torch.device("cpu")), "test", {}, has_wandb_key=False)
    collapse_attention(trainer, after=30)
    manifest = trainer.run()
    (divergence,) = manifest.divergences
    assert "entropy" in divergence.reason
    last_healthy = 30 - MARGIN_STEPS
    assert divergence.back_to == last_healthy // checkpoint_every * checkpoint_every
    assert manifest.steps == 60


def test_a_run_stopped_in_a_collapse_keeps_its_way_back(tmp_path: Path, shards: Path) -> None:
    """Every stop makes a checkpoint, whatever is pending; ten of them leave the good one where it is."""
    recipe = tiny_recipe(tmp_path / "run", shards, run__steps=90, run__checkpoint_every=10, run__eval_every=10)
    trainer = Trainer(recipe, World(0, 1, torch.device("cpu")), "test", {}, has_wandb_key=False)
    collapse_attention(trainer, after=20)
    trainer.go_to(None, trainer.state)
    for step in range(1, 31):
        trainer.step()
        if step % 10 == 0 or step > 20:
            trainer._save()
    trainer.checkpoints.wait()
    assert {10, 30} <= set(trainer.checkpoints._steps())
    assert trainer.checkpoints.newest(up_to=30 - trainer.state.watch.suspect_steps - MARGIN_STEPS) is not None


def test_a_run_that_ends_before_the_alarm_has_no_best_checkpoint(tmp_path: Path, shards: Path) -> None:
    """Fewer steps of low entropy than an alarm takes: none of its checkpoints is a candidate, its result says so and can be read."""
    recipe = tiny_recipe(tmp_path / "run", shards, run__steps=12, run__checkpoint_every=4, run__eval_every=4)
    trainer = Trainer(recipe, World(0, 1, torch.device("cpu")), "test", {}, has_wandb_key=False)
    collapse_attention(trainer, after=1)
    manifest = trainer.run()
    assert (manifest.best_step, manifest.best_loss, manifest.model_step) == (0, None, 12)
    assert RunManifest.read(recipe.output) == manifest


def collapse_attention(trainer: Trainer, *, after: int) -> None:
    """Until something is frozen, every step later than `after` has a millionth of its attention's entropy."""
    accumulate = trainer._accumulate

    def collapsed(micro_batches: list[PackedBatch], units: int) -> torch.Tensor:
        sums = accumulate(micro_batches, units)
        if trainer.state.step >= after and not trainer.state.frozen:
            sums[-1] *= 1e-6
        return sums

    trainer._accumulate = collapsed


def test_gives_up_when_all_is_frozen(tmp_path: Path, shards: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", shards, optimizer__lr_connector=1e30, run__steps=12, run__eval_every=12)
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
    rng, watch = np.random.default_rng(seed), DivergenceDetector()
    for step in range(300):
        loss = level * (1 + math.exp(-step / 50)) * math.exp(rng.normal(0, noise))
        assert watch.observe(loss, math.exp(rng.normal(0, 1)), rng.uniform(0.01, 2.0)) is None


@given(level=st.floats(0.1, 10.0), rise=st.floats(3.0, 1e6))
def test_a_lasting_spike_is_and_a_short_one_is_not(level: float, rise: float) -> None:
    watch = DivergenceDetector()
    for _ in range(HISTORY_STEPS):
        assert watch.observe(level, 1.0, 1.0) is None
    for _ in range(SPIKE_STEPS - 1):
        assert watch.observe(level * rise, 1.0, 1.0) is None
    assert watch.observe(level, 1.0, 1.0) is None
    signs = [watch.observe(level * rise, 1.0, 1.0) for _ in range(SPIKE_STEPS)]
    assert signs[:-1] == [None] * (SPIKE_STEPS - 1)
    assert "running mean" in str(signs[-1])


@given(gaps=st.lists(st.integers(0, 5), min_size=3, max_size=19))
def test_suspect_steps_reach_back_to_the_first_sign(gaps: list[int]) -> None:
    """Steps of text only say nothing about attention: a collapse is as old as its first sign."""
    watch = DivergenceDetector()
    watch.observe(1.0, 1.0, 2.0)
    steps = 0
    for gap in gaps:
        for entropy in [1e-5, *[0.0] * gap]:
            steps += 1
            assert watch.observe(1.0, 1.0, entropy) is None
            assert watch.suspect_steps == steps
    watch.observe(1.0, 1.0, 2.0)
    assert watch.suspect_steps == 0


def test_other_signs() -> None:
    watch = DivergenceDetector()
    for _ in range(HISTORY_STEPS):
        watch.observe(1.0, 1.0, 2.0)
    assert [watch.observe(math.nan, 1.0, 2.0) for _ in range(NONFINITE_STEPS)][-1] is not None
    watch.nonfinite = 0
    assert [watch.observe(1.0, 1e4, 2.0) for _ in range(SPIKE_STEPS)][-1] is not None
    watch.norm_spikes = 0
    assert any(watch.observe(1.0, 1.0, 1e-5) for _ in range(30))
    assert DivergenceDetector.model_validate(watch.model_dump(mode="json")) == watch
