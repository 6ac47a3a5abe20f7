"""The speed phase on real steps: an honest table, and a choice that leaves the samples of a step alone."""

from pathlib import Path

import pandas as pd
import pytest

from fvlm_core.config import MicroBatch, Recipe
from fvlm_core.data.loader import train_steps
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.train.bench import Bench, Running
from fvlm_core.train.jobs import SWEPT, SpeedJob, SpeedReport, Sweep
from fvlm_core.train.speed import candidates, run
from tests.train.conftest import tiny_recipe


def keys(recipe: Recipe) -> list[list[str]]:
    """The samples of every step."""
    steps = train_steps(ShardSet(recipe.shards), recipe.data, recipe.run, tokens_per_frame=1, rank=0, world_size=1)
    return [sorted(key for batch in batches for key in batch.keys) for batches in steps]


@pytest.mark.slow(reason="measures several variants of the training step")
def test_report(tmp_path: Path, shards: Path) -> None:
    recipe = tiny_recipe(tmp_path / "untouched", shards)
    job = SpeedJob(
        output=tmp_path / "speed",
        recipe=recipe,
        sweep=Sweep(threads=[1], micro_batch=[MicroBatch(frames=64)]),
        warmup_steps=1,
        steps=8,
        sweep_steps=6,
    )
    report = run(job)
    assert SpeedReport.read_whole(job.output) == report
    table = pd.read_csv(job.output / "speed.csv")
    assert [table["variant"].iloc[0], table["variant"].iloc[-1]] == ["naive", "tuned"]
    assert (table[["step_s", "samples_per_s", "frames_per_s", "gflops_per_s", "peak_memory_gb"]] > 0).all(axis=None)
    assert (table["samples_per_s"] * table["step_s"]).tolist() == pytest.approx([8.0] * len(table))
    assert report.chosen.keys() == set(SWEPT.values())
    assert (report.pairs, report.rows[-1].over) == (8, "naive")
    assert report.speedup is not None
    assert report.speedup_low is not None
    assert report.speedup_low <= report.speedup
    assert report.summary().count("n=8 pairs") == 1
    assert set(report.parts) == {"naive", "tuned"}
    for shares in report.parts.values():
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares["encode"], shares["query"], shares["LLM"], shares["loss"], shares["optimizer"]) > 0
    for name in report.parts:
        assert "aten::" in (job.output / f"{name}-operations.txt").read_text()
        assert (job.output / f"{name}-trace.json.gz").stat().st_size > 1000
    assert report.checkpoint.steps >= 1
    assert report.checkpoint.bytes > 4 * 3 * 1000
    assert report.chosen["run.precision"] == recipe.run.precision
    assert keys(recipe.with_changes(report.chosen)) == keys(recipe)
    assert not recipe.output.exists()


def test_budgets_around_the_recipes_own_are_tried() -> None:
    own = MicroBatch(frames=3, tokens=100)
    tried = candidates(Sweep(), own, "cpu")["run.micro_batch"]
    assert tried == [{"frames": f, "tokens": t} for f, t in [(3, 100), (6, 200), (1, 50), (1, 25)]]
    assert candidates(Sweep(micro_batch=[own]), MicroBatch(), "cpu")["run.micro_batch"] == [own.model_dump()]


def test_no_measurement_runs_out_of_steps_or_is_refused_for_their_number(tmp_path: Path, shards: Path) -> None:
    """How often a run may go through a source is said of the recipe's own steps, and a long list of values takes more of them."""
    recipe = tiny_recipe(tmp_path / "untouched", shards, data__mixture=[{"source": "gaze_cell", "share": 1.0, "max_epochs": 1}])
    sweep = Sweep(micro_batch=[MicroBatch(frames=8 + n) for n in range(100)])
    job = SpeedJob(output=tmp_path / "speed", recipe=recipe, sweep=sweep, warmup_steps=1)
    running = Bench(job).start("", {})
    assert isinstance(running, Running)
    assert running.trainer.steps > job.warmup_steps + job.steps + len(sweep.micro_batch or ()) * job.sweep_steps
