"""The ablation table: signs, controls, runs that cannot be compared, and the same bytes again."""

import csv
from pathlib import Path
from typing import Any

import pytest

from fvlm_core.errors import UserError
from fvlm_core.manifest import Manifest
from fvlm_core.scaling.ablations import compare
from fvlm_core.scaling.jobs import ABLATIONS_PLOT, ABLATIONS_TABLE, ABLATIONS_TEXT, AblationJob, AblationReport, AblationRun
from fvlm_core.scaling.tables import show_value
from tests.scaling.build import finished

SEED_NOISE = {0: 0.0, 1: 0.05, 2: -0.04}
"""Of a seed, the same for all runs: pairs take it out."""
OWN_NOISE = {"base": (0.0, 0.002, -0.002), "cool": (0.001, -0.002, 0.001)}


def seeded(folder: Path, name: str, loss: float, change: str = "", value: Any = None, **fields: Any) -> list[AblationRun]:
    """Three runs of a name whose losses have the seeds' noise and a little of their own."""
    changes, settings = fields.pop("changes", {change: value} if change else {}), {"name": name, "change": change, "value": value}
    settings |= {"control": fields.pop("control", False), "hypothesis": f"what is expected of {name}"}
    runs = []
    for seed, noise in SEED_NOISE.items():
        own = OWN_NOISE.get(name, (0.002, 0.0, -0.002))[seed]
        run = finished(folder / f"{name}-{seed}", loss + noise + own, changes=changes | {"run.seed": seed}, **fields)
        runs.append(AblationRun(**settings, seed=seed, run=run))
    return runs


@pytest.fixture
def job(tmp_path) -> AblationJob:
    """Of three seeds each: a better run, a worse one, a control that is best of all, one that changed its validation set, one that
    diverged, and one that cannot be distinguished from the baseline."""
    pooled = {"model.query": "pooled", "model.fine_iterations": 0, "loss.fine": []}
    runs = [
        *seeded(tmp_path, "base", 2.0),
        *seeded(tmp_path, "frozen", 2.25, "optimizer.lr_vision", 0.0),
        *seeded(tmp_path, "cool", 1.9, "model.temperature", 0.5),
        *seeded(tmp_path, "same", 2.001, "model.temperature", 0.9),
        *seeded(tmp_path, "pooled", 1.5, "model.query", "pooled", changes=pooled, losses={"coarse": 1.5}, control=True),
        *seeded(tmp_path, "order", 1.0, "data.question_first", 1.0),
        *seeded(tmp_path, "wild", 1.2, "optimizer.lr_llm", 1.0, divergences=[_divergence()]),
    ]
    return AblationJob(output=tmp_path / "out", baseline="base", runs=runs)


def test_change_of_the_data_wins_where_validation_is_given(tmp_path):
    given = {"data.validation": {"mixture": [{"source": "gaze_cell", "share": 1.0}]}}
    runs = seeded(tmp_path, "base", 2.0, changes=given)
    runs += seeded(tmp_path, "order", 1.0, "data.question_first", 1.0, changes=given | {"data.question_first": 1.0})
    report = compare(AblationJob(output=tmp_path / "out", baseline="base", runs=runs))
    assert not report.rows[1].other_validation
    assert (report.winner, report.winner_change) == ("order", "data.question_first")


def test_values_read_as_a_person_would_write_them():
    mixture = [{"source": "clips", "share": 0.86}, {"source": "text", "share": 0.14}]
    assert show_value(mixture) == "clips 86%, text 14%"
    assert [show_value(value) for value in ([1.0, 2.0], "deep", 0.5, None)] == ["[1.0, 2.0]", "deep", "0.5", ""]


def test_verdicts(job):
    report = compare(job)
    rows = {row.name: row for row in report.rows}
    assert {name: row.verdict for name, row in rows.items()} == {
        "base": "baseline",
        "frozen": "worse",
        "cool": "better",
        "same": "no evidence",
        "pooled": "better",
        "order": "other validation",
        "wild": "diverged",
    }
    assert (report.winner, report.winner_change, report.winner_value) == ("cool", "model.temperature", 0.5)
    cool = rows["cool"]
    assert cool.delta == pytest.approx(-0.1, abs=1e-3)
    assert cool.low is not None
    assert cool.high is not None
    assert cool.threshold is not None
    assert cool.low < -0.1 < cool.high < 0 < cool.threshold < 0.05
    assert cool.seeds == 3
    assert cool.hypothesis == "what is expected of cool"
    assert report.noise.value == pytest.approx(0.002, abs=0.001), "pairs take out the seeds' 0.05"
    assert rows["frozen"].also_changed == []
    assert rows["pooled"].also_changed == ["loss.fine", "model.fine_iterations"]
    assert rows["wild"].divergences == 3
    assert rows["base"].frames_per_s == 20
    assert rows["base"].mode_gain == pytest.approx(0.2)
    assert rows["base"].drift == pytest.approx(-0.1)
    assert AblationReport.read(job.output).problems(job.output) == []


def test_runs_that_start_from_other_weights_say_so(tmp_path):
    """The folder of the earlier run may differ; its digest may not."""
    starts = {"base": ("one", "a"), "copied": ("two", "a"), "other": ("one", "b"), "fresh": (None, None)}
    runs = []
    for name, (folder, digest) in starts.items():
        inputs = {"shards": "a" * 64} | ({"init_from": digest * 64} if digest else {})
        changes = {"init_from": str(tmp_path / folder) if folder else None, "optimizer.lr_llm": 0.5 if name != "base" else 0.1}
        runs.append(AblationRun(name=name, change="optimizer.lr_llm", run=finished(tmp_path / name, 2.0, changes=changes, inputs=inputs)))
    runs[0] = runs[0].model_copy(update={"change": ""})
    rows = {row.name: row for row in compare(AblationJob(output=tmp_path / "out", baseline="base", runs=runs)).rows}
    assert {name: row.also_changed for name, row in rows.items()} == {
        "base": [],
        "copied": [],
        "other": ["init_from"],
        "fresh": ["init_from"],
    }


def test_a_seed_that_diverged_hides_no_other_difference(job, tmp_path):
    """Its loss is that of an early checkpoint: no noise of the others."""
    alone = {row.name: row for row in compare(job).rows}
    lost = finished(tmp_path / "half", 6.0, changes={"optimizer.lr_llm": 0.5, "run.seed": 1}, divergences=[_divergence()])
    kept = finished(tmp_path / "kept", 1.95, changes={"optimizer.lr_llm": 0.5, "run.seed": 0})
    half = [AblationRun(name="half", change="optimizer.lr_llm", value=0.5, seed=seed, run=run) for seed, run in ((0, kept), (1, lost))]
    rows = {row.name: row for row in compare(job.model_copy(update={"runs": [*job.runs, *half], "output": tmp_path / "more"})).rows}
    assert rows["half"].verdict == "diverged"
    assert {name: row.verdict for name, row in alone.items()} == {name: rows[name].verdict for name in alone}
    assert rows["cool"].low == pytest.approx(alone["cool"].low, abs=1e-3)


def test_a_seed_of_the_baseline_that_diverged_raises_no_threshold(tmp_path):
    runs = [*seeded(tmp_path, "base", 2.0), *seeded(tmp_path, "cool", 1.7, "model.temperature", 0.5)]
    lost = finished(tmp_path / "lost", 6.1, changes={"run.seed": 1}, divergences=[_divergence()])
    runs = [run.model_copy(update={"run": lost}) if (run.name, run.seed) == ("base", 1) else run for run in runs]
    report = compare(AblationJob(output=tmp_path / "out", baseline="base", runs=runs, min_gain=0.1))
    base, cool = report.rows
    assert report.winner == "cool"
    assert base.loss == pytest.approx(2.0, abs=0.1)
    assert cool.loss - base.loss == pytest.approx(cool.delta, abs=0.06), "seeds differ by 0.05"
    assert base.divergences == 1


def test_a_baseline_that_diverged_is_none(tmp_path):
    runs = seeded(tmp_path, "base", 2.0, divergences=[_divergence()]) + seeded(tmp_path, "cool", 1.9, "model.temperature", 0.5)
    with pytest.raises(UserError, match="the baseline 'base' diverged with every seed"):
        compare(AblationJob(output=tmp_path / "out", baseline="base", runs=runs))


def test_one_seed_gives_no_verdict_and_no_winner(job):
    report = compare(job.model_copy(update={"runs": [run for run in job.runs if run.seed == 0]}))
    assert {row.verdict for row in report.rows} == {"baseline", "no verdict", "other validation", "diverged"}
    assert report.winner == "base"
    assert report.noise.value is None
    text = (job.output / ABLATIONS_TEXT).read_text()
    assert text.startswith("**The control pooled beats the baseline**")
    assert "noise not measured: no verdict" in text


def test_baseline_stays_where_nothing_beats_it(job):
    report = compare(job.model_copy(update={"runs": [run for run in job.runs if run.name != "cool"]}))
    assert (report.winner, report.winner_change) == ("base", "")


@pytest.mark.parametrize(("min_gain", "winner"), [(0.045, "cool"), (0.055, "base")])
def test_a_gain_that_is_too_small_is_not_adopted(job, min_gain, winner):
    """1.9 is 5 % below the baseline's 2.0."""
    report = compare(job.model_copy(update={"min_gain": min_gain}))
    assert report.winner == winner
    assert {row.name: row.verdict for row in report.rows}["cool"] == "better"


def test_a_difference_that_is_not_relevant_is_no_finding(job):
    rows = {row.name: row for row in compare(job.model_copy(update={"relevance": 0.06})).rows}
    assert (rows["cool"].verdict, rows["frozen"].verdict) == ("no evidence", "worse")


def test_differences_at_equal_flops_are_along_the_curves(tmp_path):
    """The costlier run is behind at equal samples' FLOPs: its curve is read at what the baseline spent."""
    runs = []
    for name, flops, loss in (("base", 1e9, 2.0), ("wide", 2e9, 1.9)):
        folder = finished(tmp_path / name, loss, changes={} if name == "base" else {"model.temperature": 0.5}, flops=flops)
        curve = [(flops / 4, loss + 1.0), (flops, loss)]
        (folder / "metrics.csv").write_text("step,flops,val_loss\n" + "".join(f"1,{spent},{value}\n" for spent, value in curve))
        runs.append(AblationRun(name=name, change="" if name == "base" else "model.temperature", value=0.5, run=folder))
    row = compare(AblationJob(output=tmp_path / "out", baseline="base", runs=runs)).rows[1]
    assert row.delta == pytest.approx(-0.1)
    assert row.delta_equal_flops == pytest.approx(1.9 + 0.5 - 2.0), "half of the way in log FLOPs"


def test_negative_results_are_in_every_form(job):
    compare(job)
    with (job.output / ABLATIONS_TABLE).open() as stream:
        table = {row["name"]: row for row in csv.DictReader(stream)}
    assert float(table["frozen"]["delta"]) == pytest.approx(0.25, abs=1e-3)
    assert (table["frozen"]["value"], table["frozen"]["verdict"]) == ("0.0", "worse")
    assert table["pooled"]["loss_fine2"] == ""
    text = (job.output / ABLATIONS_TEXT).read_text()
    assert text.startswith("**The control pooled beats the baseline** by 0.5")
    assert "| frozen | optimizer.lr_vision = 0.0 | 3 | 2.2533 | +0.25" in text
    assert r"| pooled\* | model.query = pooled | 3 |" in text
    assert "| order† | data.question_first = 1.0 | 3 |" in text
    assert "Diverged: wild." in text
    assert "| **cool** |" in text
    assert text.index("order") < text.index("frozen")  # best first
    assert (job.output / ABLATIONS_PLOT).read_bytes().startswith(b"\x89PNG")


def test_the_same_runs_give_the_same_digest(job, tmp_path):
    again = job.model_copy(update={"output": tmp_path / "again"})
    assert compare(job).digest == compare(again).digest


def test_runs_on_other_shards_cannot_be_compared(job, tmp_path):
    stray = AblationRun(name="stray", change="run.seed", value=1, run=finished(tmp_path / "stray", 2.0, inputs={"shards": "b" * 64}))
    with pytest.raises(UserError, match=r"'base.*' and 'stray' used different shards"):
        compare(job.model_copy(update={"runs": [*job.runs, stray]}))


@pytest.mark.parametrize("baseline", ["nobody", ""])
def test_a_baseline_must_be_a_run(job, baseline):
    with pytest.raises(UserError, match="must be one of the runs"):
        compare(job.model_copy(update={"baseline": baseline}))


def test_an_unfinished_run_is_named(job, tmp_path):
    missing = AblationRun(name="missing", change="run.seed", value=1, run=tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        compare(job.model_copy(update={"runs": [*job.runs, missing]}))


def test_only_finished_comparisons_have_a_manifest(job):
    with pytest.raises(UserError):
        compare(job.model_copy(update={"baseline": "nobody"}))
    with pytest.raises(UserError, match="no manifest"):
        Manifest.read(job.output)


def _divergence() -> dict:
    return {"step": 5, "reason": "loss", "back_to": 0, "froze": "vision"}
