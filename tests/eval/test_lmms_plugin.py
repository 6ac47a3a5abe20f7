"""The plugin in the real lmms-eval, on a local task of gaze items. Skipped where its environment was not made (infra/lmms_env.sh)."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from benchmarks import gaze_forms
from fvlm_core.eval.benchmark_result import chosen
from fvlm_core.eval.benchmarks import benchmark
from fvlm_core.eval.benchmarks.benchmark import LETTERS
from fvlm_core.eval.jobs import CheckpointJob
from fvlm_core.eval.parts.benchmarks import BenchmarksResult
from fvlm_core.eval.records import ItemRecord
from fvlm_core.serve.evaluate import evaluate_checkpoint
from infra.stack import REPOSITORY
from tests.eval.published import jsonl, png

PROGRAM = REPOSITORY / ".venv-lmms" / "bin" / "lmms-eval"
pytestmark = [
    pytest.mark.slow(reason="starts lmms-eval, which takes half a minute"),
    pytest.mark.skipif(not PROGRAM.exists(), reason="lmms-eval's environment was not made: ./infra/lmms_env.sh"),
]
CONDITION = "question_first/autoregressive"
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.results
generation_kwargs: {{max_new_tokens: 4, until: ["\\n"]}}
metric_list:
  - {{metric: accuracy, aggregation: mean, higher_is_better: true}}
"""
UTILS = """
from PIL import Image


def visual(doc):
    return [doc["video"]] if doc["video"].endswith(".mp4") else [Image.open(doc["video"])]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["prompt"]


def results(doc, results):
    return {"accuracy": float(results[0] == doc["answer"])}
"""
LETTERED, PLAIN, OPEN, BROKEN = "gaze_lettered", "gaze_plain", "gaze_open", "gaze_broken"


def write_tasks(folder: Path, data: Path) -> None:
    """The gaze items as lmms-eval's tasks: with Video-MME's prompt, with nothing but question and options, an open one, a broken file."""
    prompt = benchmark("videomme").prompt
    tasks: dict[str, list[dict[str, str]]] = {LETTERED: [], PLAIN: []}
    for item in gaze_forms.items(2):
        options = [f"{letter}. {text}" for letter, text in zip(LETTERS, item.choices, strict=False)]
        for name, asked in ((LETTERED, prompt.with_letters(item)), (PLAIN, "\n".join([item.question, *options]))):
            tasks[name].append({"video": str(data / "data" / f"{item.clip}.mp4"), "prompt": asked, "answer": LETTERS[item.gold or 0]})
    (folder / "red.png").write_bytes(png())
    (folder / "broken.mp4").write_bytes(b"no video")
    tasks[OPEN] = [{"video": str(folder / "red.png"), "prompt": "What is this?", "answer": "nothing"}]
    tasks[BROKEN] = [{"video": str(folder / "broken.mp4"), "prompt": "What is this?", "answer": "nothing"}]
    (folder / "utils.py").write_text(UTILS)
    for name, lines in tasks.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, questions=jsonl(folder / f"{name}.jsonl", lines)))


@pytest.fixture(scope="module")
def ours(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, BenchmarksResult]:
    """The items' folder, the evaluation's folder, and what `fvlm eval` finds."""
    folder = tmp_path_factory.mktemp("ours")
    data = gaze_forms.write(folder / "videomme", "videomme", 2)
    ask = {"controls": False, "modes": ["autoregressive"], "orders": ["question_first"]}
    job = {
        "output": folder / "evaluation",
        "checkpoint": model_folder,
        "benchmarks": {"run": ["videomme"], "data": {"videomme": data}, "ask": ask},
        "resamples": 20,
        "device": "cpu",
    }
    results = evaluate_checkpoint(CheckpointJob.model_validate(job))
    assert results is not None
    part = results.part(BenchmarksResult)
    assert part is not None
    return data, job["output"], part


def test_lmms_eval_says_what_fvlm_eval_says_question_by_question(
    ours: tuple[Path, Path, BenchmarksResult], model_folder: Path, tmp_path: Path
):
    """18 questions on the same mp4 files, by the option's letter and by its text; one process runs all the configurations."""
    data, evaluation, part = ours
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_tasks(tasks, data)
    found: dict[str, Path] = {name: tmp_path / name for name in ("letter", "text", "open", "broken", "no_mode", "no_argument")}

    def run(place: str, task: str, arguments: str) -> dict[str, object]:
        values = {"model": "fvlm", "model_args": f"pretrained={model_folder},{arguments}", "tasks": task, "include_path": str(tasks)}
        return values | {"output_path": str(found[place]), "log_samples": True, "device": "cpu"}

    configurations = [
        run("no_mode", LETTERED, "mode=coarse"),
        run("no_argument", LETTERED, "modes=all"),
        run("broken", BROKEN, "mode=coarse_only"),
        run("letter", LETTERED, "mode=autoregressive"),
        run("text", PLAIN, "mode=autoregressive,answer=text"),
        run("open", OPEN, "mode=coarse_only"),
    ]
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(configurations))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [PROGRAM, "eval", "--config", tmp_path / "runs.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500, cwd=tmp_path)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]

    shards = sorted((evaluation / "items" / "videomme").glob("*.jsonl"))
    records = [ItemRecord.model_validate_json(line) for shard in shards for line in shard.read_text().splitlines()[1:]]
    assert len(records) == 18
    for place, scorer in (("letter", "letter"), ("text", "mean")):
        accuracy, answers = read(found[place])
        assert answers == [LETTERS[chosen(record, CONDITION, scorer) or 0] for record in records]
        ours_by = part.benchmarks["videomme"].conditions[CONDITION].by_scorer
        assert accuracy == pytest.approx(ours_by[scorer].value, abs=1e-6)

    assert len(set(read(found["text"])[1])) > 1, "one answer to everything shows little"
    _, (said,) = read(found["open"])
    assert "\n" not in said
    for place, reason in (("no_mode", "has no mode coarse"), ("no_argument", "unknown arguments: modes"), ("broken", "cannot be decoded")):
        assert not found[place].exists()
        assert reason in output


def test_processes_that_share_the_documents_know_where_to_meet(model_folder: Path):
    """With several of them lmms-eval gathers their counts on the model's device; how it deals out documents is its own affair."""
    program = (
        "from lmms_eval import models; from fvlm_core.serve.lmms_plugin import FVLM; "
        f"print(FVLM(pretrained={str(model_folder)!r}, device='cpu').device)"
    )
    command = [PROGRAM.with_name("python"), "-c", program]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout == "cpu\n", done.stderr[-3000:]


def read(folder: Path) -> tuple[float, list[str]]:
    """The accuracy, and the answers in the order of the documents."""
    (results,) = folder.rglob("*_results.json")
    (numbers,) = json.loads(results.read_text())["results"].values()
    accuracy = next(value for name, value in numbers.items() if name.startswith("accuracy,"))
    (samples,) = folder.rglob("*_samples_*.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    return accuracy, [line["filtered_resps"][0] for line in lines]
