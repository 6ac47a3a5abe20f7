"""The output folder of `fvlm eval` collects the benchmarks of one checkpoint, and loses none."""

import json
import shutil
from pathlib import Path

import pytest

from deployments.evaluate import evaluate
from fvlm_core.data.jobs import TOKENIZER_FOLDER
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.errors import UserError
from fvlm_core.eval.parts.benchmarks import BenchmarksResult
from fvlm_core.eval.results import Results
from fvlm_core.model.build import load_model, save_model
from fvlm_core.serve.eval_folder import CLAIM_FILE
from tests.eval.conftest import make_run


def run_it(checkpoint: Path, output: Path, **options: object) -> None:
    evaluate(**{"checkpoint": checkpoint, "output": output, "limit": 4, "mode": "coarse", "device": "cpu", "latency_clips": 0, **options})


def benchmarks(output: Path) -> dict:
    part = Results.read(output).part(BenchmarksResult)
    assert part is not None
    return part.benchmarks


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "own"
    folder.mkdir(parents=True)
    lines = [{"question": f"Is {number} even?", "choices": ["yes", "no"], "answer": "AB"[number % 2]} for number in range(4)]
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder.parent


def test_a_further_benchmark_is_added(model_folder: Path, data: Path, tmp_path: Path):
    output = tmp_path / "out"
    run_it(model_folder, output, benchmarks="gaze", latency_clips=1)
    first = benchmarks(output)["gaze"]
    run_it(model_folder, output, benchmarks="own", data=data)
    assert list(benchmarks(output)) == ["gaze", "own"]
    assert benchmarks(output)["gaze"] == first
    results = Results.read(output)
    assert list(results.outside) == ["benchmarks.data.own"]
    assert "latency" in results.parts
    tables = (output / "tables.md").read_text()
    assert first.title in tables
    assert benchmarks(output)["own"].title in tables
    run_it(model_folder, output, benchmarks="gaze,own", data=data)
    assert list(benchmarks(output)) == ["gaze", "own"]


def test_another_evaluation_is_not_replaced(model_folder: Path, shards: Path, tmp_path: Path):
    output = tmp_path / "out"
    run_it(model_folder, output)
    before = contents(output)
    model = load_model(make_run(tmp_path / "run", shards, tokens_per_frame=4) / "model")
    save_model(model, tmp_path / "other", tokenizer=shards / TOKENIZER_FOLDER)
    with pytest.raises(UserError, match="holds the evaluation of tiny-model, another checkpoint than other's") as refused:
        run_it(tmp_path / "other", output)
    assert refused.value.fix == "give another --output (output), or delete the folder"
    with pytest.raises(UserError, match=r"settings\.benchmarks\.limit was 4 and is 5, settings\.seed was 0 and is 1"):
        run_it(model_folder, output, limit=5, seed=1)
    with pytest.raises(UserError, match=r"settings\.benchmarks\.ask\.generate was False and is True"):
        run_it(model_folder, output, generate=True)
    assert contents(output) == before


def test_benchmarks_of_another_version_are_measured_again_or_kept(model_folder: Path, data: Path, tmp_path: Path):
    output = tmp_path / "out"
    run_it(model_folder, output, benchmarks="own", data=data)
    values = json.loads((output / "results.json").read_text())
    (output / "results.json").write_text(json.dumps(values | {"code": "an older one"}))
    before = contents(output)
    with pytest.raises(UserError, match="another version of the code or of a library measured own") as refused:
        run_it(model_folder, output, benchmarks="gaze")
    assert "name own in --benchmarks too" in refused.value.fix
    assert contents(output) == before
    run_it(model_folder, output, benchmarks="gaze,own", data=data)
    assert sorted(benchmarks(output)) == ["gaze", "own"]


def test_the_evaluation_of_a_pipeline_is_not_replaced(model_folder: Path, tmp_path: Path):
    output = tmp_path / "out"
    run_it(model_folder, output)
    (output / CLAIM_FILE).unlink()
    with pytest.raises(UserError, match="holds the evaluation of tiny-model by the pipeline or an older version"):
        run_it(model_folder, output)


def test_an_interrupted_evaluation_keeps_its_folder(model_folder: Path, tmp_path: Path):
    output = tmp_path / "out"
    run_it(model_folder, output)
    done = benchmarks(output)
    for name in ("results.json", "tables.md"):
        (output / name).unlink()
    with pytest.raises(UserError, match="with other settings"):
        run_it(model_folder, output, seed=3)
    run_it(shutil.copytree(model_folder, tmp_path / "moved"), output)
    assert benchmarks(output) == done


def test_validation_reads_the_shards_of_the_run(run: Path, model_folder: Path, shards: Path, tmp_path: Path):
    found = []
    run = shutil.copytree(run, tmp_path / "run")
    shutil.copytree(shards / TOKENIZER_FOLDER, run / "model", dirs_exist_ok=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "validation").symlink_to(shards)
    for name, checkpoint in (("run", run), ("model", run / "model")):
        run_it(checkpoint, tmp_path / "out" / name, benchmarks="validation")
        found.append(benchmarks(tmp_path / "out" / name))
        assert Results.read(tmp_path / "out" / name).shards == ShardSet(shards).manifest.digest
    run_it(model_folder, tmp_path / "given", benchmarks="validation", data=tmp_path / "data")
    assert found == [benchmarks(tmp_path / "given")] * 2
    with pytest.raises(UserError, match="only a run's folder says which shards") as refused:
        run_it(model_folder, tmp_path / "refused", benchmarks="validation")
    assert "link it as DIR/validation for --data DIR" in refused.value.fix
    moved = shutil.copytree(run, tmp_path / "moved")
    recipe = (moved / "recipe.yaml").read_text()
    (moved / "recipe.yaml").write_text(recipe.replace(str(shards), str(tmp_path / "gone")))
    with pytest.raises(UserError, match=f"the run's shards are not found: {tmp_path / 'gone'}"):
        run_it(moved, tmp_path / "refused", benchmarks="validation")
