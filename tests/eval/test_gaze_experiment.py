"""The pieces of `benchmarks.gaze`: its training at the smallest size, its controls, its numbers against independent ones."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import gaze as experiment
from benchmarks import gaze_results
from benchmarks.gaze_measures import CONTROLS, MAIN, Answers, Asked, answers, table
from benchmarks.gaze_training import LLM, PLANS, VISION, Plan, entropy_at_start, step_flops, train
from fvlm_core.config import VisionSettings, VisionShape
from fvlm_core.data import digits, gaze
from fvlm_core.data.batch import pack
from fvlm_core.eval.stats import Bootstrap
from fvlm_core.model.build import build_model

TINY = Plan(steps=2, batch_samples=8, encoder_steps=2, warmup_steps=1)
CLIPS = 12


@pytest.fixture(scope="module")
def trained():
    return train(TINY)


@pytest.fixture(scope="module")
def asked():
    return Asked(TINY, CLIPS)


def test_training_is_a_function_of_the_plan(trained):
    again, other = train(TINY), train(replace(TINY, seed=1))
    weights, same, different = (one.subject.model.state_dict() for one in (trained, again, other))
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert any(not torch.equal(weights[name], different[name]) for name in weights)


def test_time_is_limited():
    assert train(replace(TINY, encoder_steps=0, steps=500, max_cpu_s=0.05)).steps < 500


def test_the_encoder_learns_at_its_own_rate():
    before = train(replace(TINY, steps=0)).subject.model.state_dict()
    frozen = train(replace(TINY, vision_learning_rate=0.0)).subject.model.state_dict()
    kept = {name.split(".")[0] for name in before if torch.equal(before[name], frozen[name])}
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], frozen[name])}
    assert (kept, changed) == ({"encoder"}, {"connector", "llm"})


def test_weights_start_with_the_standard_deviation_that_is_asked_for():
    usual, small = (train(replace(TINY, steps=0, encoder_steps=0, init_std=std)).subject.model.state_dict() for std in (None, 0.02))
    for name in (name for name, weights in usual.items() if name.startswith("llm.") and weights.ndim == 2):
        assert usual[name].std().item() == pytest.approx(96**-0.5, rel=0.05)
        assert small[name].std().item() == pytest.approx(0.02, rel=0.05)
    assert all(torch.equal(usual[name], small[name]) for name in usual if not name.startswith("llm.") or usual[name].ndim == 1)


@pytest.mark.parametrize("task", ["cell", "hunt"])
def test_a_step_s_cost_is_known_before(task):
    plan = replace(TINY, task=task, encoder_steps=0)
    trained = train(plan)
    assert trained.flops / trained.steps == pytest.approx(step_flops(plan), rel=0.05)


def test_clutter_grows_only_while_questions_are_answered():
    never = train(replace(TINY, encoder_steps=0, clutter_gate=0.0, clutter_step=0.5))
    always = train(replace(TINY, encoder_steps=0, clutter_gate=99.0, clutter_step=0.5))
    assert (never.clutter, never.full_at) == (0.0, None)
    assert (always.clutter, always.full_at) == (1.0, 2)


def test_production_s_plan_at_sizes_of_a_laptop(monkeypatch):
    """Frames larger than the grid, clips drawn by another process."""
    monkeypatch.setitem(VISION, "production", VisionSettings(shape=VisionShape(width=16, layers=1, heads=2), frame_px=224))
    monkeypatch.setitem(LLM, "production", LLM["laptop"])
    small = {"device": "cpu", "frame_px": 112, "steps": 2, "batch_samples": 8, "copies": 0}
    plan = replace(PLANS["production"], **small, encoder_steps=0, workers=1)
    trained = train(plan)
    assert trained.steps == 2
    held_out = Asked(plan, 3)
    assert held_out.clips[0].frames.shape == (plan.frames, 112, 112, 3)
    found = answers(trained, held_out)[MAIN]
    assert found.hits is not None
    assert found.hits.shape == found.right.shape == (3, plan.frames)
    seen = train(replace(plan, encoder_steps=2, steps=0, workers=0))
    assert seen.encoder_accuracy.keys() == {"own", "right", "below"}


def test_first_query_comes_from_the_question(trained, asked):
    """With the question first no frame is blind: the first one's query is made of the token before it."""
    samples = [trained.asker.sample(asked.clips[0], question_first=first) for first in (True, False)]
    batch = pack(samples, trained.asker.chat)
    sources, places = batch.query_sources[:, 0], batch.visual_positions[:, 0]
    assert (sources[:3] == places[:3] - 1).all()
    assert sources[3] < 0
    assert (sources[4:] == places[3:5]).all()


def test_every_condition_answers_the_same_questions(trained, asked):
    said = answers(trained, asked)
    assert {MAIN, "coarse, question after", "fine, random queries", "fine, black frames"} <= set(said)
    assert all(one.right.shape == (CLIPS, TINY.frames) for one in said.values())
    assert {name for name, one in said.items() if one.hits is not None} >= {MAIN, "coarse, question first"}
    rows = table(said, asked, Bootstrap(resamples=50, seed=0))
    assert [row.condition for row in rows] == list(said)
    for row in rows:
        assert row.accuracy.n == CLIPS
        assert row.accuracy.value == pytest.approx(said[row.condition].right.mean(), abs=1e-6)


def test_accuracy_counts_digits_at_their_places(trained, asked, monkeypatch):
    """Answers that are known beforehand: all right, the first digit wrong, one digit too many."""

    def said(change):
        texts = [change(clip.answer) for clip in asked.clips]
        monkeypatch.setattr(type(trained.subject), "generate", lambda *_, **__: texts)
        return answers(trained, asked)[MAIN].right

    assert said(str).all()
    assert (said(lambda text: str((int(text[0]) + 1) % 10) + text[1:]) == [False, True, True]).all()
    assert not said(lambda text: text + "1").any()


def test_comparisons_agree_with_scipy(asked):
    rng = np.random.default_rng(0)
    found = {name: Answers(rng.random((CLIPS, 3)) < share) for name, share in ((MAIN, 0.9), ("a", 0.3), ("b", 0.7), ("c", 0.85))}
    rows = {row.condition: row for row in table(found, asked, Bootstrap(resamples=4000, seed=0))}
    raw = {}
    for name in "abc":
        gain = found[MAIN].right.mean(1) - found[name].right.mean(1)
        test = stats.permutation_test((gain,), np.mean, permutation_type="samples", n_resamples=np.inf)
        raw[name] = test.pvalue
        assert rows[name].difference.value == pytest.approx(gain.mean(), abs=1e-6)
        interval = stats.bootstrap(
            (gain,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(1)
        ).confidence_interval
        assert (rows[name].difference.low, rows[name].difference.high) == pytest.approx(tuple(interval), abs=0.03)
    lowest, middle, highest = sorted("abc", key=raw.__getitem__)
    steps = [min(1, 3 * raw[lowest]), min(1, 2 * raw[middle]), raw[highest]]
    assert [rows[name].p_value for name in (lowest, middle, highest)] == pytest.approx(np.maximum.accumulate(steps), abs=1e-5)
    assert rows[MAIN].p_value is None


def test_digits_that_are_always_misread_widen_the_interval_and_show_in_their_form():
    """A reader of form 9 and of half of the other digits: certain for these digits, not for others."""
    held_out = Asked(TINY, 200)
    right = (held_out.forms == 9) | (held_out.originals % 2 == 0)
    (row,) = table({MAIN: Answers(right)}, held_out, Bootstrap(resamples=300, seed=0))
    assert row.by_form.keys() == set(digits.VAL_FORMS)
    for form, share in row.by_form.items():
        assert share == pytest.approx(right[held_out.forms == form].mean(), abs=1e-4)
    assert row.by_form[9] == 1
    both = row.over_clips_and_digits
    assert both is not None
    assert (both.value, both.count) == (row.accuracy.value, 600)
    assert both.n == min(200, len(np.unique(held_out.originals)))
    assert both.high - both.low > 1.2 * (row.accuracy.high - row.accuracy.low)


def test_few_clips_that_are_all_right_are_no_certainty(asked):
    found = {MAIN: Answers(np.ones((CLIPS, 3), bool), np.ones((CLIPS, 3), bool))}
    (row,) = table(found, asked, Bootstrap(resamples=50, seed=0))
    assert row.on_target is not None
    assert row.accuracy.low == row.on_target.low == pytest.approx(0.025 ** (1 / CLIPS), abs=1e-6)


def test_bag_ceiling_is_the_best_guess_without_places():
    """0.286 for nine digits of ten kinds, by drawing them."""
    drawn = np.random.default_rng(0).integers(10, size=(40_000, 9))
    expected = np.mean([np.bincount(row).max() / 9 for row in drawn])
    assert expected == pytest.approx(0.286, abs=0.002)
    of_five = np.mean([np.bincount(row).max() / 5 for row in drawn[:, :5]])  # of six colours, five stand once
    for task, best in (("cell", expected), ("colour", expected), ("track", of_five)):
        assert Asked(Plan(task=task), 300).bag_ceiling == pytest.approx(best, abs=0.01)


def test_constant_answer_is_the_most_frequent_digit(asked):
    digits = [digit for clip in asked.clips for digit in clip.answer]
    assert asked.constant == max(digits.count(digit) for digit in "0123456789") / len(digits)


def test_entropy_is_a_share_of_the_uniform(trained):
    """Very soft attention is uniform, very hard attention is on one patch."""
    model = trained.subject.model
    before = model.connector.temperature
    try:
        model.connector.temperature = 1e6
        assert entropy_at_start(trained.subject, trained.asker, clips=4)["coarse"] == pytest.approx(1, abs=1e-3)
        model.connector.temperature = 1e-4
        # heads that look at different patches are averaged: 4 heads on 9 patches
        assert entropy_at_start(trained.subject, trained.asker, clips=4)["coarse"] <= np.log(4) / np.log(9) + 1e-3
    finally:
        model.connector.temperature = before


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_train_and_answer(name, asked):
    plan = replace(TINY, encoder_steps=0, steps=1, batch_samples=4, model=CONTROLS[name])
    assert experiment.control(plan, asked).right.shape == (CLIPS, 3)


def test_nine_pooled_tokens_are_the_patches():
    plan = Plan(model=CONTROLS["9 pooled tokens"])
    model = build_model(plan.model_settings, vocab_size=300)
    features = model.encode(torch.from_numpy(gaze.render(np.random.default_rng(0), "val", frames=2).frames))
    assert features.patches is not None
    assert torch.allclose(model._pool(features), features.patches[:, 1:], atol=1e-6)


QUICK = ["--steps", "1", "--encoder-steps", "0", "--clips", "4", "--no-controls"]


def test_command_prints_a_record_of_each_seed(capsys):
    experiment.main([*QUICK, "--json", "--task", "hunt", "--first-seed", "3", "--wording", "sentence"])
    [record] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (record["task"], record["seed"], record["clips"]) == ("hunt", 3, 4)
    assert record["rows"][0]["accuracy"]["n"] == 4
    assert record["rows"][0]["over_clips_and_digits"]["count"] == 12
    assert set(record["rows"][0]["by_form"]) <= {str(form) for form in digits.VAL_FORMS}


def test_a_training_goes_on_with_another_task(tmp_path, capsys):
    """Weights that one task left are those that the next begins with."""
    weights = tmp_path / "cell.pt"
    experiment.main([*QUICK, "--json", "--save", str(weights)])
    kept = torch.load(weights, weights_only=True)
    begun = train(replace(TINY, task="hunt", steps=0), start=kept).subject.model.state_dict()
    assert all(torch.equal(kept[name], begun[name]) for name in kept)
    experiment.main([*QUICK, "--json", "--task", "hunt", "--start", str(weights)])
    assert [json.loads(line)["start"] for line in capsys.readouterr().out.splitlines()] == [None, "cell.pt"]


def test_results_are_put_beside_controls(tmp_path, capsys):
    """Two seeds and a control, from records to tables and plots; the worst seed is named."""
    for number in (0, 1):
        experiment.main([*QUICK, "--json", "--first-seed", str(number)])
    experiment.main([*QUICK, "--json", "--only", "9 pooled tokens"])
    lines = capsys.readouterr().out.splitlines()
    runs = [json.loads(line) for line in lines]
    faster = json.loads(lines[0]) | {"vision_learning_rate": 2e-3, "encoder_accuracy": {"own": 0.9}, "encoder_keeps": {"own": 0.4}}
    for number, run in enumerate([*runs, faster]):  # accuracies that are known
        for row in run["rows"]:
            row["accuracy"] |= {"value": 0.5 - 0.1 * number, "low": 0.1, "high": 0.9}
        if number == 1:  # a record of before the digits were kept
            run["rows"] = [
                {key: value for key, value in row.items() if key not in ("over_clips_and_digits", "by_form")} for row in run["rows"]
            ]
        run["curve"] = [{"step": 25, "clutter": 0.0, "first": 2.3, "after": 2.3}, {"step": 50, "clutter": 0.2, "first": 1.0, "after": 2.2}]
        (tmp_path / f"{number}.json").write_text(json.dumps(run))
    document = tmp_path / "document.md"
    document.write_text(f"before\n{gaze_results.BEGIN}\nan earlier table\n{gaze_results.END}\nafter\n")
    drawn = ["--figure", str(tmp_path / "plot"), "--curves", str(tmp_path / "curves")]
    gaze_results.main([str(tmp_path), "--document", str(document), *drawn])
    gaze_results.main([str(tmp_path)])
    text = capsys.readouterr().out.strip()
    assert document.read_text() == f"before\n{gaze_results.BEGIN}\n\n{text}\n\n{gaze_results.END}\nafter\n"
    assert text.index("**0.400 (seed 1)**") < text.index("**0.200 (seed 0)**"), "another rate of the encoder's is another table"
    assert "| 9 pooled tokens | 0 | 9 | 1 |" in text
    [head] = {line for line in text.splitlines() if "fine, over clips and digits" in line}
    [new, old] = [line for line in text.splitlines() if line.startswith(("| 0 | 1 | 0.500", "| 1 | 1 | 0.400"))]
    assert head.endswith("| fine, over clips and digits | fine, by form |")
    assert "]" in new.split(" | ")[-2]
    assert old.endswith("|  |  |"), "an older record has no such interval"
    assert "| cell | 0 | 0.002 | 1 | 0.900 -> 0.400 |" in text
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "plot.svg").read_text()
    assert "cell, seed 1, question after" in re.sub(r"<!--|-->", "", (tmp_path / "curves.svg").read_text())


def test_aims_are_reached_by_the_worst_seed():
    def run(**changes):
        numbers = {
            "coarse": 0.3,
            "fine": 0.95,
            "autoregressive": 0.94,
            "by_frame": [0.93, 0.96, 0.96],
            "by_cell": [0.9, None, 0.86],
            "gaze": 0.92,
        }
        numbers |= changes
        rows = [
            {"condition": name, "accuracy": estimate(numbers[key]), "by_frame": numbers["by_frame"], "by_cell": numbers["by_cell"]}
            | {"on_target": estimate(numbers["gaze"])}
            for name, key in ((gaze_results.COARSE, "coarse"), (MAIN, "fine"), (gaze_results.AUTOREGRESSIVE, "autoregressive"))
        ]
        return {"rows": rows}

    def estimate(value):
        return {"value": value, "low": value, "high": value, "n": 10, "count": 10, "exact": False}

    def missed(*runs):
        return gaze_results.reached(runs).partition("Not reached: ")[2]

    assert missed(run(), run()) == "nothing."
    assert missed(run(), run(coarse=0.33)) == "coarse at most 0.32."
    assert missed(run(fine=0.92), run(autoregressive=0.92)) == "fine at least 0.93, autoregressive within 0.02."
    assert missed(run(by_frame=[0.9, 0.96, 0.96]), run()) == "first frame within 0.05 of the others."
    assert missed(run(by_cell=[0.84, 0.99, 0.99]), run(gaze=0.89)) == "every cell at least 0.85, gaze at least 0.9."


def test_the_document_holds_the_tables_of_the_recorded_runs():
    root = Path(gaze_results.__file__).parent
    tables = gaze_results.report(gaze_results.read(root / "gaze_runs"))
    assert tables in (root.parent / "docs" / "research.md").read_text(), gaze_results.__doc__


def test_command_names_the_worst_seed(capsys):
    experiment.main([*QUICK, "--seeds", "2"])
    assert "worst seed" in capsys.readouterr().out
