"""The best checkpoint is the one the recipe's own measure says."""

import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvlm_core.config import BestSettings
from fvlm_core.errors import UserError
from fvlm_core.train.__main__ import train
from fvlm_core.train.validation import score
from tests.train.conftest import tiny_recipe

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


@pytest.mark.parametrize(
    ("best", "message"),
    [({"passes": {"fine3": 1.0}}, "names fine3; passes with a loss weight: coarse, fine1, fine2"), ({"passes": {"fine2": 0.0}}, "above 0")],
)
def test_measures_that_do_not_exist(tmp_path: Path, shards: Path, best: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_recipe(tmp_path, shards, best=BestSettings.model_validate(best).model_dump())
