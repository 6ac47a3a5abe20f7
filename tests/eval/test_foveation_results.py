"""What `benchmarks.foveation` times, and its results: seeds in order, what was not measured is said, FLOPs counted on the model itself."""

import json
import math

import pytest
import torch
from PIL import Image

from benchmarks.foveation import besides_downscaling
from benchmarks.foveation_results import MODELS, main, mflop, read, table
from fvlm_core.model.inference import read_batch
from tests.model.build_glance import glance_model, packed


def write(folder, seed: int, *, shift: float = 0.0) -> None:
    """A result on 3 x 3 cells, of which the second seed has no autoregressive figures."""
    result: dict = {"grid": 3, "seed": seed}
    for place, (_, key, opened) in enumerate(MODELS):
        result[key] = {"accuracy": place / 10 + shift, "hit": math.nan if opened < 1 else 0.5}
    if not seed:
        result["k1_autoregressive"] = {"accuracy": 0.25, "hit": 0.5}
    (folder / f"world_3_{seed}.json").write_text(json.dumps(result))


def test_seeds_stand_side_by_side(tmp_path):
    write(tmp_path, 1, shift=0.01)
    write(tmp_path, 0)
    ((grid, results),) = read(tmp_path).items()
    rows = {row[0]: row[1:4] for row in table(grid, results).rows}
    assert rows["k = 1, after 100 steps on chosen patches"] == ["0.300, 0.310", "0.250, -", "0.500, 0.500"]
    assert rows["every patch open"] == ["0.000, 0.010", "", ""]


def test_the_plot_is_drawn_and_an_empty_folder_refused(tmp_path):
    with pytest.raises(ValueError, match="no world_GRID_SEED"):
        read(tmp_path)
    write(tmp_path, 0)
    main([str(tmp_path), "--figure", str(tmp_path / "plot")])
    assert Image.open(tmp_path / "plot.png").width > 500
    assert (tmp_path / "plot.svg").exists()


def test_opening_costs_by_the_patch():
    """With one glance patch, opening it is opening all; each child costs alike."""
    assert mflop(3, -1) < mflop(3, 1)
    assert mflop(3, 1) == pytest.approx(mflop(3, 0), rel=0.01)


def test_what_is_timed_besides_downscaling_is_the_model():
    model = glance_model(zoom=2, levels=2).float()
    batch = packed(model)
    timed, plain = besides_downscaling(model, batch)(), read_batch(model, batch, "coarse_fine")
    assert torch.equal(timed.tokens, plain.tokens)
    assert torch.equal(timed.hidden, plain.hidden)
