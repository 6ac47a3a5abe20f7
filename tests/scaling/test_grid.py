"""The scaling study from finished runs to the chosen size: constructed laws, the smallest grid, and equal bytes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from fvlm_core.errors import UserError
from fvlm_core.scaling import grid, plots
from fvlm_core.scaling.choice import choose
from fvlm_core.scaling.fits import Law
from fvlm_core.scaling.grid import study
from fvlm_core.scaling.jobs import (
    FITS_FILE,
    PLOTS,
    POINTS_FILE,
    SCALING_TEXT,
    VECTOR_PLOTS,
    GridJob,
    GridPoint,
    GridRun,
    ScalingReport,
    Variant,
)
from fvlm_core.scaling.study import to_grid
from tests.scaling.build import finished

LAW = Law(E=1.2, A=60.0, alpha=0.35, B=90.0, beta=0.3)
SIZES = {"xs": 200_000, "s": 600_000, "m": 2_000_000, "l": 6_000_000}
BUDGETS = (1e13, 4e13, 1.6e14, 6.4e14)
POOLED = {"model.query": "pooled", "model.fine_iterations": 0, "loss.fine": [], "model.tokens_per_frame": 16}


def grid_job(folder: Path, sizes: dict[str, int], *, baseline_extra=lambda budget: 0.05, **fields) -> GridJob:
    """A grid whose foveated runs obey LAW with C = 6 N D; the baseline's loss differs by `baseline_extra(budget)`."""
    runs = []
    for size, params in sizes.items():
        for budget in BUDGETS:
            tokens = round(budget / (6 * params))
            loss = float(LAW.loss(np.array(params), np.array(tokens)))
            for variant in ("foveated", "baseline"):
                run = finished(
                    folder / f"{size}-{budget:.0e}-{variant}",
                    loss + (baseline_extra(budget) if variant == "baseline" else 0),
                    changes=POOLED if variant == "baseline" else {},
                    params=params,
                    label_tokens_seen=tokens,
                    frames_seen=tokens // 4,
                    flops=6.0 * params * tokens,
                    losses={"coarse": loss},
                )
                runs.append(GridRun(size=size, budget_flops=budget, variant=variant, run=run))
    return GridJob(output=folder / "out", runs=runs, **fields)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten empty files in place of five plots, for tests of numbers: to draw them takes two seconds."""

    def plot_grid(output: Path, *_: object) -> None:
        for name in (*PLOTS, *VECTOR_PLOTS):
            (output / name).touch()

    monkeypatch.setattr(grid, "plot_grid", plot_grid)


def fits_of(job: GridJob) -> dict:
    return json.loads((job.output / FITS_FILE).read_text())


def test_a_grid_that_obeys_a_law(tmp_path):
    job = grid_job(tmp_path, SIZES)
    report = study(job)
    fits = fits_of(job)
    assert report.exponents["foveated.alpha"].value == pytest.approx(0.35, abs=1e-4)  # tokens are whole numbers
    assert report.exponents["foveated.beta"].value == pytest.approx(0.3, abs=1e-4)
    assert report.exponents["foveated.data_beta"].value == pytest.approx(0.3, abs=1e-3)
    assert fits["variants"]["foveated"]["law_huber"]["alpha"]["value"] == pytest.approx(0.35, abs=1e-4)
    assert fits["variants"]["foveated"]["held_out"]["mean_relative_error"]["value"] < 1e-4
    assert fits["variants"]["foveated"]["held_out"]["law"] == "the joint law"
    lowest = min(
        (point for point in report.points if point.variant == "foveated" and point.budget_flops == BUDGETS[-1]), key=lambda p: p.loss
    )
    assert report.chosen == lowest.size
    assert f"{BUDGETS[-1]:.2e}" in report.chosen_reason
    # 16 tokens per frame: at equal data 16 times the visual tokens, more to reach the same loss
    assert fits["token_ratio_at_equal_loss"]["value"] > 16
    assert report.crossover_flops.value is None
    assert "the foveated is better" in report.crossover_flops.reason
    assert ScalingReport.read(job.output).problems(job.output) == []


def test_the_final_budget_chooses_by_the_law():
    """At 1000 times the budget a larger size wins than at the grid's largest."""
    points = [
        GridPoint(
            run_id=f"{size} {budget}",
            size=size,
            variant="foveated",
            params=params,
            budget_flops=budget,
            flops=budget,
            samples=1,
            frames=1,
            tokens_per_frame=1,
            tokens=round(budget / (6 * params)),
            loss=float(LAW.loss(np.array(params), np.array(budget / (6 * params)))),
        )
        for size, params in SIZES.items()
        for budget in BUDGETS
    ]
    near, far = (choose(points, to_grid(points), target_flops=budget) for budget in (None, BUDGETS[-1] * 1000))
    assert SIZES[far.size] > SIZES[near.size]
    assert "the joint law predicts" in far.reason
    assert "1000 times beyond the grid" in far.reason
    losses = {size: float(LAW.loss(np.array(n), np.array(BUDGETS[-1] * 1000 / (6 * n)))) for size, n in SIZES.items()}
    first, second = sorted(losses, key=lambda size: losses[size])[:2]
    assert (far.size, far.runner_up, far.share) == (first, second, 1.0)
    assert far.margin == pytest.approx(losses[second] - losses[first], rel=1e-3)


@pytest.mark.usefixtures("undrawn")
def test_the_smallest_grid_says_what_it_cannot_know(tmp_path):
    job = grid_job(tmp_path, {name: SIZES[name] for name in ("xs", "s", "m")}, target_flops=1e18)
    report = study(job)
    alpha = fits_of(job)["variants"]["foveated"]["law"]["alpha"]
    assert alpha["value"] is None
    assert "3 model sizes, at least 4 are needed" in alpha["reason"]
    assert report.exponents["foveated.data_beta"].value == pytest.approx(0.3, abs=1e-3)
    assert report.exponents["foveated.data_beta"].low is not None
    assert "each size's own law over data predicts" in report.chosen_reason
    text = (job.output / SCALING_TEXT).read_text()
    assert f"Chosen size: **{report.chosen}**" in text
    assert "foveated: alpha of the joint law" in text
    assert "not identifiable: 3 model sizes, at least 4 are needed" in text


@pytest.mark.usefixtures("undrawn")
def test_crossover_between_budgets(tmp_path):
    """The baseline is ahead at small budgets, behind at large ones."""
    report = study(grid_job(tmp_path, {"xs": SIZES["xs"]}, baseline_extra=lambda budget: 0.1 * np.log(budget / 1e14)))
    assert report.crossover_flops.value == pytest.approx(1e14, rel=0.01)


@pytest.mark.usefixtures("undrawn")
def test_cells_that_diverged_make_no_crossover(tmp_path):
    """The baseline is behind at every budget; of its runs at the largest, only the smallest model's has not diverged."""
    job = grid_job(tmp_path, SIZES, baseline_extra=lambda budget: -0.02)
    lost = [run for run in job.runs if run.variant == "baseline" and run.budget_flops == BUDGETS[-1] and run.size != "xs"]
    for run in lost:
        path = run.run / "manifest.json"
        diverged = {"divergences": [{"step": 5, "reason": "loss", "back_to": 0, "froze": "vision"}]}
        path.write_text(json.dumps(json.loads(path.read_text()) | diverged))
    report = study(job)
    assert report.crossover_flops.value is None


@pytest.mark.usefixtures("undrawn")
def test_equal_losses_choose_the_smaller_size(tmp_path):
    runs = [
        GridRun(size=size, budget_flops=1e12, variant="foveated", run=finished(tmp_path / size, 2.0, params=params))
        for size, params in (("big", 2000), ("small", 1000))
    ]
    report = study(GridJob(output=tmp_path / "out", runs=runs))
    assert report.chosen == "small"
    assert report.crossover_flops.reason == "only one variant was run"


@pytest.mark.usefixtures("undrawn")
def test_plots_show_the_means_of_a_cell_s_seeds():
    def point(size: str, params: int, variant: Variant, loss: float) -> GridPoint:
        run = f"{size}-{variant}-{loss}"
        more = {"budget_flops": 1e9, "flops": 1e9, "samples": 1, "frames": 1, "tokens_per_frame": 1, "tokens": 1000}
        return GridPoint(run_id=run, size=size, variant=variant, params=params, loss=loss, **more)

    points = [point("s", 10, "foveated", 2.0), point("s", 10, "foveated", 3.0), point("s", 10, "baseline", 2.5)]
    assert plots._pairs(points, "s") == [(1e9, 0.0)]
    assert plots._best_params([*points[:2], point("l", 20, "foveated", 2.4)]) == 20


def test_seeds_of_a_cell_show_the_noise(tmp_path):
    losses = {0: 2.0, 1: 2.1, 2: 1.9}
    runs = [
        GridRun(size="a", budget_flops=1e12, variant="foveated", seed=seed, run=finished(tmp_path / f"a{seed}", loss))
        for seed, loss in losses.items()
    ]
    report = study(GridJob(output=tmp_path / "out", runs=runs))
    fits = fits_of(GridJob(output=tmp_path / "out", runs=runs))
    noise = fits["variants"]["foveated"]["noise"]
    assert noise["value"] == pytest.approx(0.05)
    assert noise["low"] < 0.05 < noise["high"]
    assert "2 of them another seed" in " ".join(fits["notes"])
    assert "2.0000 ± 0.1000 (n=3)" in (tmp_path / "out" / SCALING_TEXT).read_text()
    assert report.chosen == "a"


def test_the_same_runs_give_the_same_bytes(tmp_path):
    job = grid_job(tmp_path, {name: SIZES[name] for name in ("xs", "s", "m")})
    first = study(job)
    again = study(job.model_copy(update={"output": tmp_path / "again"}))
    assert [(entry.path, entry.sha256) for entry in first.files] == [(entry.path, entry.sha256) for entry in again.files]
    assert {"points.csv", "fits.json", *PLOTS} <= {entry.path for entry in first.files}
    assert {entry.path for entry in first.files if entry.identity} == {POINTS_FILE, FITS_FILE}, "pictures and texts are renderings"


@pytest.mark.usefixtures("undrawn")
def test_points_hold_what_the_fits_use(tmp_path):
    job = grid_job(tmp_path, {"xs": SIZES["xs"]})
    study(job)
    with (job.output / POINTS_FILE).open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 8
    pooled = next(row for row in rows if row["variant"] == "baseline")
    assert int(pooled["visual_tokens"]) == 16 * int(pooled["frames"])


def test_unusable_grids_are_named(tmp_path):
    run = finished(tmp_path / "a", 2.0)
    one = GridRun(size="a", budget_flops=1e12, variant="foveated", run=run)
    with pytest.raises(UserError, match=r"given twice: a 1.0000e\+12 foveated"):
        study(GridJob(output=tmp_path / "out", runs=[one, one]))
    with pytest.raises(UserError, match="no foveated run"):
        study(GridJob(output=tmp_path / "out", runs=[one.model_copy(update={"variant": "baseline"})]))
    other = one.model_copy(update={"size": "b", "budget_flops": 2e12})
    with pytest.raises(UserError, match="no budget was run at every size"):
        study(GridJob(output=tmp_path / "out", runs=[one, other]))
