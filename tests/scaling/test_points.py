"""Anyone's points: a law that is known is found; what cannot be fitted is refused by row, column and reason."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from deployments.cli import app
from fvlm_core.errors import UserError
from fvlm_core.scaling.fits import Law
from fvlm_core.scaling.jobs import FITS_FILE, PLOTS, VECTOR_PLOTS
from fvlm_core.scaling.points import fit_points, read_points

LAW = Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)


def rows(sizes: int = 5, budgets: int = 4, noise: float = 0.002) -> list[dict[str, object]]:
    rng = np.random.default_rng(0)
    found = []
    for params in np.geomspace(3e7, 1e9, sizes):
        for budget in np.geomspace(1e18, 3e19, budgets):
            tokens = budget / (6 * params)
            loss = float(LAW.loss(np.array(params), np.array(tokens)) * np.exp(rng.normal(0, noise)))
            found.append(
                {"run_id": f"{params:.0f}-{budget:.1e}", "size": f"s{params:.1e}", "params": round(params), "tokens": tokens, "loss": loss}
            )
    return found


def table(path: Path, values: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(values[0]))
        writer.writeheader()
        writer.writerows(values)
    return path


def test_a_known_law_is_found_and_printed(tmp_path, capsys):
    path = table(tmp_path / "points.csv", rows())
    with pytest.raises(SystemExit) as stopped:
        app(["scaling", "fit", str(path), "--target-flops", "5e20", "--output", str(tmp_path / "out")], exit_on_error=False)
    assert stopped.value.code in (0, None)
    law = json.loads((tmp_path / "out" / FITS_FILE).read_text())["law"]
    for name in ("E", "A", "alpha", "B", "beta"):
        assert law[name]["low"] <= getattr(LAW, name) <= law[name]["high"], name
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("alpha", "beta", "relative errors", "Size for 5.00e+20 FLOPs", "E + B"))
    assert {FITS_FILE, *PLOTS, *VECTOR_PLOTS} <= {file.name for file in (tmp_path / "out").iterdir()}


def test_samples_stand_for_tokens(tmp_path):
    values = [{("samples" if name == "tokens" else name): value for name, value in row.items()} for row in rows()]
    points, data = read_points(table(tmp_path / "points.csv", values))
    assert data == "samples"
    assert len({point.budget_flops for point in points}) == 4, "nearly equal budgets are one"


def test_too_few_sizes_fit_each_size_and_refuse_the_joint_law(tmp_path):
    found = fit_points(table(tmp_path / "points.csv", rows(sizes=3)))
    assert found.study.fits.data["beta"].value == pytest.approx(0.28, abs=0.05)
    with pytest.raises(UserError, match="do not determine the joint law: 3 model sizes, at least 4 are needed"):
        found.require_law()


@pytest.mark.parametrize(
    ("change", "what", "where"),
    [
        ({"loss": "nan"}, "loss is 'nan'", "line 4"),
        ({"loss": ""}, "loss is 'empty'", "line 4"),
        ({"tokens": "-3"}, "tokens is '-3'", "line 4"),
        ({"params": "many"}, "params is 'many'", "line 4"),
        ({"params": "1.4"}, "params is 1.4, which is no count", "line 4"),
    ],
)
def test_a_bad_number_is_named_with_its_line(tmp_path, change, what, where):
    values = rows()
    values[2] |= change
    with pytest.raises(UserError, match=what) as error:
        read_points(table(tmp_path / "points.csv", values))
    assert where in error.value.where


def test_sizes_that_cannot_be_told_apart_and_short_rows_are_refused(tmp_path):
    values = rows()
    with pytest.raises(UserError, match=r"the sizes other and .* have the same parameters"):
        read_points(table(tmp_path / "points.csv", [values[0] | {"size": "other"}, *values[1:]]))
    path = table(tmp_path / "short.csv", [{"run_id": "a", "params": 1000, "tokens": 4000, "loss": 2.9, "size": "s"}])
    path.write_text(path.read_text() + "b,1000,4000,2.9\n")
    with pytest.raises(UserError, match="size of a row is empty") as caught:
        read_points(path)
    assert "line 3" in caught.value.where


def test_points_along_one_run_are_refused(tmp_path):
    values = rows()
    values[5]["run_id"] = values[4]["run_id"]
    with pytest.raises(UserError, match="several rows are of one run"):
        read_points(table(tmp_path / "points.csv", values))


@pytest.mark.parametrize("lost", ["run_id", "params", "loss", "tokens"])
def test_missing_columns_are_named(tmp_path, lost):
    values = [{name: value for name, value in row.items() if name != lost} for row in rows()]
    with pytest.raises(UserError, match=f"columns are missing: {lost}"):
        read_points(table(tmp_path / "points.csv", values))


def test_no_table_and_no_rows_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_points(tmp_path / "nothing.csv")
    (tmp_path / "empty.csv").write_text("run_id,size,params,tokens,loss\n")
    with pytest.raises(UserError, match="the table has no runs"):
        read_points(tmp_path / "empty.csv")
