"""The best checkpoint is the one the recipe's own measure says."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvlm_core.config import BestSettings, LossSettings, Recipe
from fvlm_core.data.frame_sampling import FrameSampling
from fvlm_core.data.loader import val_batches
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.errors import UserError
from fvlm_core.model.build import load_model
from fvlm_core.train.__main__ import train
from fvlm_core.train.jobs import RunManifest
from fvlm_core.train.validation import score
from tests.train.conftest import on_ranks, one_rank_then_stop, tiny_recipe

losses = st.floats(0.0, 10.0)


@given(coarse=losses, fine=losses, weights=st.tuples(st.floats(0.1, 5.0), st.floats(0.1, 5.0)), drift=st.floats(0.0, 3.0))
def test_score(coarse: float, fine: float, weights: tuple[float, float], drift: float) -> None:
    of_passes = {"coarse": coarse, "fine1": fine}
    assert score(of_passes, BestSettings()) == fine
    assert score({"coarse": coarse}, BestSettings()) == coarse
    a, b = weights
    expected = (a * coarse + b * fine) / (a + b) + drift * abs(coarse - fine)
    assert score(of_passes, BestSettings(passes={"coarse": a, "fine1": b}, drift=drift)) == pytest.approx(expected)


def test_kept_best_is_of_the_lowest_score(tmp_path: Path, shards: Path) -> None:
    """A large weight on the drift chooses another checkpoint than the last pass does."""
    changes = {"run__steps": 24, "optimizer__lr_llm": 0.02, "optimizer__lr_connector": 0.02}
    chosen = {}
    for name, best in {"plain": {}, "composite": {"passes": {"coarse": 1.0, "fine2": 2.0}, "drift": 1e5}}.items():
        recipe = tiny_recipe(tmp_path / name, shards, **changes, best=BestSettings.model_validate(best).model_dump())
        manifest = train(recipe)
        rows = pd.read_csv(recipe.output / "metrics.csv", index_col="step").loc[lambda rows: rows.index % 2 == 0]
        expected = rows["val_fine2"]
        if best:
            expected = (rows["val_coarse"] + 2 * rows["val_fine2"]) / 3 + 1e5 * (rows["val_fine2"] - rows["val_fine1"]).abs()
        assert manifest.best_step == expected.idxmin()
        assert manifest.best_loss == pytest.approx(expected.min())
        kept = recipe.output / "checkpoints" / f"step-{manifest.best_step:08d}" / "manifest.json"
        assert json.loads(kept.read_text())["score"] == manifest.best_loss
        chosen[name] = manifest.best_step
    assert chosen["plain"] != chosen["composite"]


def loss_of(recipe: Recipe) -> float:
    """Validation loss of the last pass, of the model that a run has left."""
    data = ShardSet(recipe.shards)
    model = load_model(recipe.output / "model")
    (batch,) = val_batches(data, recipe.run.eval_samples, recipe.data, tokens_per_frame=1, batch_samples=64)
    return float(model(batch, LossSettings()).sums["fine2"]) / batch.n_labels


OVERFITTED = {"run__steps": 24, "optimizer__lr_llm": 0.02, "optimizer__lr_connector": 0.02}


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Recipe:
    """A finished run whose best checkpoint is not its last."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("best") / "overfitted", shards, **OVERFITTED)
    train(recipe)
    return recipe


def test_the_models_folder_says_what_frames_it_was_shown(overfitted: Recipe) -> None:
    expected = FrameSampling.of_training(ShardSet(overfitted.shards).manifest, overfitted.data.image_repeats)
    assert overfitted.data.image_repeats != 8, "which is what a folder is taken for that does not say"
    assert FrameSampling.of_model(overfitted.output / "model", frame_px=1) == expected


@pytest.mark.parametrize("ranks", ["one", "ddp", "fsdp2"])
def test_the_model_is_the_best_checkpoints(tmp_path: Path, shards: Path, overfitted: Recipe, ranks: str) -> None:
    recipe = overfitted
    if ranks != "one":
        recipe = tiny_recipe(tmp_path / "run", shards, **OVERFITTED, run__sharding=ranks)
        on_ranks(recipe, 2)
    manifest = RunManifest.read(recipe.output)
    rows = pd.read_csv(recipe.output / "metrics.csv", index_col="step")
    assert manifest.steps == rows.index[-1] == 24
    assert 0 < manifest.model_step == manifest.best_step < 24
    row = rows.loc[manifest.model_step]
    assert manifest.losses == {name: row[f"val_{name}"] for name in recipe.passes}
    assert manifest.final_loss == manifest.best_loss < rows["val_loss"].iloc[-1]
    assert loss_of(recipe) == pytest.approx(manifest.final_loss, abs=1e-5)


def test_the_model_is_the_last_steps_where_the_recipe_says_so(tmp_path: Path, shards: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", shards, **OVERFITTED, best__use="last")
    manifest = train(recipe)
    rows = pd.read_csv(recipe.output / "metrics.csv", index_col="step")
    assert manifest.best_step < manifest.model_step == 24
    assert manifest.final_loss == rows["val_loss"].iloc[-1]
    assert loss_of(recipe) == pytest.approx(manifest.final_loss, abs=1e-5)


@pytest.mark.parametrize("damage", ["manifest", "tensors"])
def test_a_run_that_has_lost_its_best_ends_with_the_next(tmp_path: Path, shards: Path, overfitted: Recipe, damage: str) -> None:
    """What is kept and intact is what counts, and the finished run holds nothing damaged."""
    recipe = tiny_recipe(tmp_path / "run", shards, **OVERFITTED)
    shutil.copytree(overfitted.output, recipe.output)
    best = RunManifest.read(recipe.output).best_step
    (recipe.output / "manifest.json").unlink()
    damaged = recipe.output / "checkpoints" / f"step-{best:08d}"
    if damage == "manifest":
        (damaged / "manifest.json").unlink()
    else:
        next(damaged.glob("*.distcp")).write_bytes(b"")
    again = train(recipe)
    assert again == RunManifest.read_whole(recipe.output)
    rows = pd.read_csv(recipe.output / "metrics.csv", index_col="step")
    assert again.model_step == again.best_step == rows.loc[[22, 24], "val_loss"].idxmin()
    assert loss_of(recipe) == pytest.approx(again.final_loss, abs=1e-5)


@pytest.mark.parametrize(
    ("best", "message"),
    [({"passes": {"fine3": 1.0}}, "names fine3; passes with a loss weight: coarse, fine1, fine2"), ({"passes": {"fine2": 0.0}}, "above 0")],
)
def test_measures_that_do_not_exist(tmp_path: Path, shards: Path, best: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_recipe(tmp_path, shards, best=BestSettings.model_validate(best).model_dump())


@pytest.mark.parametrize(("stop", "scored"), [(3, False), (4, True)])
def test_where_a_run_was_stopped_does_not_decide_which_step_is_the_best(
    tmp_path: Path, shards: Path, overfitted: Recipe, stop: int, scored: bool
) -> None:
    """Stopped just after an evaluation, a run saves a step that an undisturbed run does not keep: it is no candidate."""
    stopped = tiny_recipe(tmp_path / "stopped", shards, **OVERFITTED)
    one_rank_then_stop(stopped, stop)
    saved = stopped.output / "checkpoints" / f"step-{stop:08d}" / "manifest.json"
    assert (json.loads(saved.read_text())["score"] is not None) == scored
    assert train(stopped).digest == RunManifest.read(overfitted.output).digest
