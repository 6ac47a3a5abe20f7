"""A benchmark of questions from outside, as its author would add it: one class for its settings, one for its result."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from fvlm_core.errors import UserError
from fvlm_core.eval.estimates import Dataset
from fvlm_core.eval.evaluate import evaluate
from fvlm_core.eval.jobs import EvalJob
from fvlm_core.eval.part import Benchmark, Context
from fvlm_core.eval.parts import RESULTS
from fvlm_core.eval.parts.multiple_choice import ChoiceResult, measure_choices
from fvlm_core.eval.results import Results
from fvlm_core.eval.validation import ValidationSplit
from tests.eval.conftest import small_job


class ToyResult(ChoiceResult):
    title = "Toy"
    dataset = Dataset(type="someone/toy", name="Toy", split="test")


class Toy(Benchmark):
    result = ToyResult
    needs_files = ("questions",)

    def measure(self, context: Context) -> ToyResult:
        from fvlm_core.eval.items import Item

        media = {item.groups["clip"]: item.media for item in context.split.items(100)}
        lines = [json.loads(line) for line in self.files["questions"].read_text().splitlines()]
        items = [
            Item(
                f"toy/{number}",
                media[line["clip"]],
                line["question"],
                line["choices"],
                line["answer"],
                {"clip": line["clip"], "task": "toy"},
            )
            for number, line in enumerate(lines)
        ]
        return measure_choices(context, items, ToyResult)


class ToyJob(EvalJob):
    toy: Toy = Toy()


OFF = {"captions": {"samples": 0}, "multiple_choice": {"questions": 0}, "question_order": {"questions": 0}, "latency": {"clips": 0}}


@pytest.fixture
def questions(split: ValidationSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(RESULTS, "toy", ToyResult)
    clips = sorted({item.groups["clip"] for item in split.items(6)})
    lines = [
        {"clip": clip, "question": "Which digit?", "choices": ["1", "2", "3"], "answer": index % 3} for index, clip in enumerate(clips)
    ]
    path = tmp_path / "toy.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def job(run: Path, shards: Path, output: Path, **toy: object) -> ToyJob:
    return ToyJob.model_validate(small_job(run, shards, output, gaze={"heatmaps": 0}, **OFF).model_dump() | {"toy": toy})


def test_a_benchmark_is_in_results_and_tables(run: Path, shards: Path, questions: Path, tmp_path: Path) -> None:
    settings = job(run, shards, tmp_path / "one", files={"questions": questions})
    assert settings.outside() == {("toy", "questions"): questions}
    report = evaluate(settings)
    results = Results.read(tmp_path / "one")
    toy = results.part(ToyResult)
    assert toy is not None
    assert results.part(ChoiceResult) is None, "a benchmark is not the part it is made like"
    assert toy.count() == len(questions.read_text().splitlines()) == report.counts["toy"]
    assert [metric.name for metric in toy.card_results()] == ["toy"]
    assert "toy" in {row[0] for row in report.headline.rows}
    assert "## Toy" in (tmp_path / "one" / "tables.md").read_text()


def test_what_is_in_its_files_is_identity_and_where_they_are_is_not(run: Path, shards: Path, questions: Path, tmp_path: Path) -> None:
    moved, changed = tmp_path / "moved.jsonl", tmp_path / "changed.jsonl"
    moved.write_bytes(questions.read_bytes())
    changed.write_text("\n".join(questions.read_text().splitlines()[1:]))
    first, same, other = (
        evaluate(job(run, shards, tmp_path / path.stem, files={"questions": path})) for path in (questions, moved, changed)
    )
    assert (first.settings_hash, first.inputs, first.digest) == (same.settings_hash, same.inputs, same.digest)
    assert first.inputs["toy.questions"] != other.inputs["toy.questions"]
    assert first.digest != other.digest


def test_without_its_files_it_is_not_measured_and_with_a_wrong_path_nothing_starts(
    run: Path, shards: Path, questions: Path, tmp_path: Path
) -> None:
    evaluate(job(run, shards, tmp_path / "one"))
    assert Results.read(tmp_path / "one").absent["toy"] == "no files were given (evaluation.toy.files: questions)"
    with pytest.raises(UserError, match="toy: its file 'questions' is missing") as refused:
        evaluate(job(run, shards, tmp_path / "two", files={"questions": tmp_path / "none.jsonl"}))
    assert refused.value.fix == "correct evaluation.toy.files.questions"
    assert not (tmp_path / "two").exists()
    with pytest.raises(ValidationError, match="files: give questions, or none"):
        job(run, shards, tmp_path / "three", files={"question": questions})
