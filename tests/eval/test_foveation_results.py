"""What `benchmarks.foveation` times, and its results: seeds in order, what was not measured is said, FLOPs counted on the model itself."""

import json
import math

import pytest
import torch
from PIL import Image

from benchmarks.foveation import besides_downscaling
from benchmarks.foveation_results import MODELS, main, mflop, read, table
from benchmarks.foveation_world import Run
from fvlm_core.model.inference import read_batch
from tests.model.build_glance import glance_model, packed


def write(folder, seed: int, *, shift: float = 0.0) -> None:
    """A result on 3 x 3 cells, of which the second seed has no autoregressive figures."""
    result: dict = {"grid": 3, "zooms": [3], "seed": seed}
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
    assert mflop(3, -1, (3,)) < mflop(3, 1, (3,))
    assert mflop(3, 1, (3,)) == pytest.approx(mflop(3, 0, (3,)), rel=0.01)


def test_an_oracle_opens_the_way_to_the_cell_at_every_level():
    """Untrained, with one patch a level: what is opened last are the cells beside the one that is asked for, and that one."""
    run = Run(12, 0, say=lambda _: None, zooms=(2, 3))
    run.use(open=1)
    cells = torch.tensor([[0, 0], [7, 4], [11, 11]])
    glance, child = run.parents(cells)
    assert glance.tolist() == [0, 2, 3]  # of 2 x 2 patches of 6 x 6 cells
    assert child.tolist() == [0, 1, 3]  # of 2 x 2 children of 3 x 3 cells: rows 6 to 8, columns 3 to 5
    assert run.accuracy("coarse_fine", opener="oracle", clips=64)["hit"] == 1


def test_what_is_timed_besides_downscaling_is_the_model():
    model = glance_model(zoom=2, levels=2).float()
    batch = packed(model)
    timed, plain = besides_downscaling(model, batch)(), read_batch(model, batch, "coarse_fine")
    assert torch.equal(timed.tokens, plain.tokens)
    assert torch.equal(timed.hidden, plain.hidden)
