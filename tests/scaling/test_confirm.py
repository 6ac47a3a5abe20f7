"""A winner on new seeds, and what runs do beside their loss: real trainings of a few steps, real shards."""

import json
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from fvlm_core.config import Recipe
from fvlm_core.eval.parts.question_order import order_results
from fvlm_core.eval.stats import Bootstrap
from fvlm_core.eval.subject import Subject
from fvlm_core.model.build import load_model
from fvlm_core.scaling.ablations import compare
from fvlm_core.scaling.confirm import RUNS, confirm
from fvlm_core.scaling.jobs import AblationJob, AblationReport, AblationRun, Confirmation, ConfirmJob
from fvlm_core.scaling.outcomes import Questions, outcomes_of
from fvlm_core.train.__main__ import train
from tests.tiny import tiny_shards

RATE = "optimizer.lr_llm"
STEPS = 15
GOOD, BAD = 5e-3, 1e-6
"""A rate at which so many steps learn, and one at which nothing does."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_shards(tmp_path_factory.mktemp("confirm") / "shards", clips=8)


def recipe(folder: Path, shards: Path, **changes: object) -> Recipe:
    values = {
        "name": "tiny",
        "output": folder,
        "shards": shards,
        "model": {
            "vision": {"shape": {"width": 16, "layers": 2, "heads": 2}, "frame_px": 42},
            "llm": {"shape": {"width": 24, "layers": 2, "heads": 2, "kv_heads": 1, "mlp_width": 48, "context": 512}},
        },
        "data": {"mixture": [{"source": "gaze_cell", "share": 1.0}]},
        "optimizer": {"lr_connector": 3e-3, "lr_vision": 1e-3, "lr_llm": BAD, "warmup_steps": 2},
        "run": {"steps": STEPS, "batch_samples": 8, "eval_every": STEPS, "eval_samples": 8, "checkpoint_every": STEPS},
    }
    return Recipe.from_values(values, where="tests").with_changes({"run.wandb": "disabled", "run.device": "cpu"} | changes)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> AblationReport:
    """Three seeds of a baseline that cannot learn, of one that can, and of pooled frames; with outcomes."""
    folder = tmp_path_factory.mktemp("compared")
    pooled = {"model.query": "pooled", "model.fine_iterations": 0, "loss.fine": []}
    runs = []
    for name, changes in (("baseline", {}), ("fast", {RATE: GOOD}), ("pooled", pooled)):
        change = next(iter(changes), "")
        for seed in (0, 1, 2):
            done = recipe(folder / f"{name}{seed}", shards, **changes, **{"run.seed": seed})
            train(done)
            values = {"change": change, "value": changes.get(change), "control": name == "pooled"}
            runs.append(AblationRun(name=name, seed=seed, run=done.output, **values))
    return compare(AblationJob(output=folder / "report", baseline="baseline", runs=runs, shards=shards, questions=8))


def job(folder: Path, shards: Path, report: Path, **fields: object) -> ConfirmJob:
    recipes = {"baseline": recipe(Path("output"), shards), "fast": recipe(Path("output"), shards, **{RATE: GOOD})}
    return ConfirmJob.model_validate({"output": folder, "report": report, "recipes": recipes, "seeds": [3, 4]} | fields)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, compared: AblationReport) -> Path:
    folder = tmp_path_factory.mktemp("report")
    compared.write(folder)
    return folder


def test_a_winner_is_trained_again_with_other_seeds(compared, report, shards, tmp_path):
    assert compared.winner == "fast"
    done = confirm(job(tmp_path, shards, report))
    assert done.confirmed
    assert done.high is not None
    assert done.high < 0
    assert {name: set(losses) for name, losses in done.losses.items()} == {"baseline": {3, 4}, "fast": {3, 4}}
    used = {Recipe.from_yaml(path).run.seed for path in (tmp_path / RUNS).glob("*/recipe.yaml")}
    assert used == {3, 4}
    assert json.loads((tmp_path / "losses.json").read_text())["fast"]["3"] == done.losses["fast"][3]
    again = confirm(job(tmp_path, shards, report))
    assert again.digest == done.digest


def test_a_gain_that_new_seeds_do_not_show_is_not_confirmed(compared, report, shards, tmp_path):
    """The recipe called fast is the baseline's: whatever chose it was luck."""
    same = {"baseline": recipe(Path("output"), shards), "fast": recipe(Path("output"), shards)}
    done = confirm(job(tmp_path, shards, report, recipes=same, seeds=[3]))
    assert (done.delta, done.confirmed) == (0.0, False)
    assert "not adopted" in done.text


def test_a_winner_that_diverges_is_not_confirmed(compared, report, shards, tmp_path):
    wild = recipe(Path("output"), shards, **{"optimizer.lr_connector": 1e30, "run.on_divergence": "end"})
    done = confirm(job(tmp_path, shards, report, recipes={"baseline": recipe(Path("output"), shards), "fast": wild}, seeds=[3]))
    assert Confirmation.read(tmp_path) == done
    assert (done.losses["fast"], done.delta, done.confirmed) == ({3: None}, None, False)
    assert done.text == "New seeds do not confirm **fast**, so it is not adopted. Diverged: fast with seed 3."


def test_a_baseline_that_won_needs_no_confirmation(compared, shards, tmp_path):
    compared.model_copy(update={"winner": "baseline", "winner_change": ""}).write(tmp_path / "report")
    done = confirm(job(tmp_path / "out", shards, tmp_path / "report"))
    assert (done.losses, done.confirmed, done.text) == ({}, False, "")


def test_every_run_has_outcomes_beside_its_loss(compared):
    rows = {row.name: row for row in compared.rows}
    assert compared.questions == 8
    assert rows["pooled"].on_target is None, "pooled frames are not looked at"
    base, fast = rows["baseline"].on_target, rows["fast"].on_target
    assert base is not None
    assert fast is not None
    assert base.delta is None
    assert fast.delta == pytest.approx(fast.value - base.value)
    assert fast.low is not None
    assert fast.low <= fast.delta


def test_outcomes_are_those_of_the_evaluation(shards, tmp_path):
    """Against the evaluation's own table of orders and modes, on the same questions."""
    done = recipe(tmp_path / "run", shards, **{RATE: GOOD, "model.fine_iterations": 2, "loss.fine": [1.0, 1.0]})
    train(done)
    questions = Questions(shards, 16)
    subject = Subject(load_model(done.output / "model").eval(), questions.shards.tokenizer, questions.shards.chat, torch.device("cpu"), 4)
    table = order_results(subject, questions.asked, subject.model.modes, Bootstrap(resamples=10, seed=0))
    loss = {(cell.order, cell.mode): cell.loss.value for cell in table.cells}
    gains = [loss[order, "coarse_only"] - loss[order, "coarse_fine"] for order in ("question_first", "question_after")]
    fine = table.cell("question_first", "coarse_fine")
    assert fine is not None
    hits = [fine.gaze_hit_rate_first_frame, fine.gaze_hit_rate]
    frames = _weighted([hit.value for hit in hits if hit], [1, 2])
    drift = loss["question_first", "autoregressive"] - loss["question_first", "coarse_fine"]
    assert astuple(outcomes_of(subject, questions.asked)) == pytest.approx((gains[0] - gains[1], frames, drift), abs=2e-4)


def _weighted(values: list[float], weights: list[int]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
