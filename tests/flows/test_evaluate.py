"""A benchmark's folder reaches the evaluation's step as an input from outside, and is looked for before anything starts."""

import json
from pathlib import Path

import pytest

from deployments.checks import load_profile
from flows.evaluate import EVALUATE
from flows.precompute import PRECOMPUTE, SHARDS
from flows.train import TRAIN, last_stage
from fvlm_core.errors import UserError
from fvlm_core.eval import external_files
from fvlm_core.eval.jobs import EvalSettings
from tasks.config import PipelineConfig
from tasks.phase import EarlierResults
from tasks.steps import Step, StepResult


def config(folder: Path, ranks: int = 1) -> PipelineConfig:
    evaluation = EvalSettings.model_validate({"benchmarks": {"run": ["own"], "data": {"own": folder}}})
    profile = load_profile("ci")
    return profile.model_copy(update={"evaluation": evaluation, "machine": profile.machine.model_copy(update={"ranks": ranks})})


def step(profile: PipelineConfig, volume: Path) -> Step:
    shards, run = (StepResult(name=name, folder=f"steps/{name}", digest=name) for name in ("shards", "run"))
    made = {PRECOMPUTE.name: {SHARDS: shards}, TRAIN.name: {last_stage(profile): run}}
    (one,) = EVALUATE.steps(profile, EarlierResults(volume, made, {}, {}))
    return one


def questions(folder: Path, answer: str = "4") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "mine.jsonl").write_text(json.dumps({"question": "2 + 2?", "answer": answer}))
    return folder


def test_a_missing_folder_is_refused_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"benchmarks: its data.own is missing") as refused:
        EVALUATE.prepare(config(tmp_path / "none"), tmp_path)
    assert refused.value.fix == "correct evaluation.benchmarks.data.own"


def test_what_the_annotations_say_names_the_step_and_where_they_are_does_not(tmp_path: Path) -> None:
    here, there = questions(tmp_path / "here"), questions(tmp_path / "there")
    first = step(config(here), tmp_path)
    assert first.job_settings(tmp_path)["benchmarks"]["data"] == {"own": str(here)}
    assert step(config(there), tmp_path).key == first.key
    assert EVALUATE.outside(config(here), tmp_path) == EVALUATE.outside(config(there), tmp_path)
    (there / "video.mp4").write_bytes(b"media are known by the annotations")
    assert step(config(there), tmp_path).key == first.key
    questions(there, "5")
    assert step(config(there), tmp_path).key != first.key
    assert EVALUATE.outside(config(here), tmp_path) != EVALUATE.outside(config(there), tmp_path)


def test_benchmarks_are_asked_by_all_ranks_and_that_is_no_part_of_the_result(tmp_path: Path) -> None:
    folder = questions(tmp_path / "here")
    alone, four = step(config(folder), tmp_path), step(config(folder, ranks=4), tmp_path)
    assert (alone.ranks, four.ranks) == (0, 4)
    assert alone.key == four.key


def test_a_large_file_is_known_by_its_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_files, "SMALL_BYTES", 3)
    file = tmp_path / "large"
    file.write_bytes(b"12345")
    before = external_files.quick_digest(file)
    assert external_files.quick_digest(file) == before
    file.write_bytes(b"123456")
    assert external_files.quick_digest(file) != before
