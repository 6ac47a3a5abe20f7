"""A benchmark's files reach the evaluation's step as inputs from outside, and are looked for before anything starts."""

from pathlib import Path

import pytest

from deployments.checks import load_profile
from flows.evaluate import EVALUATE
from flows.precompute import PRECOMPUTE, SHARDS
from flows.train import TRAIN, last_stage
from fvlm_core.errors import UserError
from fvlm_core.eval import outside
from fvlm_core.eval.jobs import EvalSettings
from fvlm_core.eval.part import Benchmark, Context, NotMeasuredError, PartResult
from tasks.config import PipelineConfig
from tasks.phase import Before
from tasks.steps import Made, Step


class Toy(Benchmark):
    needs_files = ("questions",)

    def measure(self, context: Context) -> PartResult:
        raise NotMeasuredError("only its files matter here")


class ToySettings(EvalSettings):
    toy: Toy = Toy()


def config(file: Path) -> PipelineConfig:
    return load_profile("ci").model_copy(update={"evaluation": ToySettings(toy=Toy(files={"questions": file}))})


def step(profile: PipelineConfig, volume: Path) -> Step:
    shards, run = (Made(name=name, folder=f"steps/{name}", digest=name) for name in ("shards", "run"))
    made = {PRECOMPUTE.name: {SHARDS: shards}, TRAIN.name: {last_stage(profile): run}}
    (one,) = EVALUATE.steps(profile, Before(volume, made, {}, {}))
    return one


def test_a_missing_file_is_refused_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="toy: its file 'questions' is missing"):
        EVALUATE.prepare(config(tmp_path / "none.jsonl"), tmp_path)


def test_what_is_in_a_file_names_the_step_and_where_it_is_does_not(tmp_path: Path) -> None:
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    here.write_text("{}")
    there.write_text("{}")
    first = step(config(here), tmp_path)
    assert first.job_settings(tmp_path)["toy"]["files"] == {"questions": str(here)}
    assert step(config(there), tmp_path).key == first.key
    assert EVALUATE.outside(config(here), tmp_path) == EVALUATE.outside(config(there), tmp_path)
    there.write_text("{ }")
    assert step(config(there), tmp_path).key != first.key
    assert EVALUATE.outside(config(here), tmp_path) != EVALUATE.outside(config(there), tmp_path)


def test_a_large_file_is_known_by_its_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "SMALL_BYTES", 3)
    file = tmp_path / "large"
    file.write_bytes(b"12345")
    before = outside.quick_digest(file)
    assert outside.quick_digest(file) == before
    file.write_bytes(b"123456")
    assert outside.quick_digest(file) != before
    assert outside.quick_digest(tmp_path / "none") == "missing"
