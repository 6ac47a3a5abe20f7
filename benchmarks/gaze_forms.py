"""The questions of the gaze benchmark, written in the schemas of Video-MME, MVBench and MLVU with real mp4 files, put to a checkpoint by
`fvlm eval`; with `--lmms` also by lmms-eval's own program, compared question by question.

A model that has learned the gaze benchmark has to score far above blind in all of them alike; any other shows what a form adds or takes.

    python -m benchmarks.gaze_forms MODEL --clips 32 --lmms
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from fvlm_core.data.clips import encode_mp4
from fvlm_core.errors import UserError
from fvlm_core.eval.benchmark_result import BenchmarkResult, chosen
from fvlm_core.eval.benchmarks import gaze
from fvlm_core.eval.benchmarks.benchmark import LETTERS
from fvlm_core.eval.checkpoint import CheckpointJob, evaluate_checkpoint
from fvlm_core.eval.items import Item
from fvlm_core.eval.parts.benchmarks import BenchmarksResult
from fvlm_core.eval.records import ItemRecord
from fvlm_core.tables import Table, number

FORMS = {"videomme": "data", "mvbench": "video/clevrer/video_validation", "mlvu": "video/count"}
"""Where each keeps its videos."""
ANNOTATIONS = {"videomme": "videomme/test-00000-of-00001.parquet", "mvbench": "json/moving_count.json", "mlvu": "json/count.json"}
QUESTIONS = 9
"""About each clip."""
SCALE = 4
"""Of the clips in the files: 168 px."""
MODE, SCORER = "autoregressive", "mean"
LMMS = Path(__file__).parents[1] / ".venv-lmms" / "bin" / "lmms-eval"
TASK = {
    "task": "gaze",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_target": "answer",
    "generation_kwargs": {"max_new_tokens": 4},
    "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
}
TASK_FUNCTIONS = """
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
process_results: !function utils.results
"""
UTILS = """
def visual(doc):
    return [doc["video"]]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["prompt"]


def results(doc, results):
    return {"accuracy": float(results[0] == doc["answer"])}
"""


def main() -> None:
    """Ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="as `fvlm eval` takes it")
    parser.add_argument("--clips", type=int, default=32, help="with nine questions each")
    parser.add_argument("--lmms", action="store_true", help="also by lmms-eval (./infra/lmms_env.sh)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as place:
        folder = Path(place)
        found, records = by_fvlm(options.checkpoint, folder, options.clips)
        print(table(found).markdown())
        if options.lmms:
            print(agreement(records, by_lmms(options.checkpoint, folder, options.clips)))


def by_fvlm(checkpoint: Path, folder: Path, clips: int) -> tuple[dict[str, BenchmarkResult], list[ItemRecord]]:
    """Results by form, the benchmark's own among them, and the records of Video-MME's."""
    data = {form: write(folder / form, form, clips) for form in FORMS}
    benchmarks = {"run": ["gaze", *FORMS], "data": data, "limit": QUESTIONS * clips, "ask": {"orders": ["question_first"]}}
    job = {"output": folder / "out", "checkpoint": checkpoint, "benchmarks": benchmarks, "device": "cpu"}
    results = evaluate_checkpoint(CheckpointJob.model_validate(job))
    part = results.part(BenchmarksResult) if results else None
    assert part is not None
    shards = sorted((folder / "out" / "items" / "videomme").glob("*.jsonl"))
    records = [ItemRecord.model_validate_json(line) for shard in shards for line in shard.read_text().splitlines()[1:]]
    return part.benchmarks, records


def by_lmms(checkpoint: Path, folder: Path, clips: int) -> dict[str, str]:
    """The letter that lmms-eval's program got for each question, by the option's text, in `MODE`. Raises UserError where it fails."""
    if not LMMS.exists():
        raise UserError("lmms-eval's environment was not made", where=str(LMMS), fix="./infra/lmms_env.sh")
    task = folder / "task"
    task.mkdir()
    lines, names = [], []
    for item in items(clips):
        prompt = "\n".join([item.question, *(f"{letter}. {text}" for letter, text in zip(LETTERS, item.choices, strict=False))])
        video = str(folder / "videomme" / FORMS["videomme"] / f"{item.clip}.mp4")
        lines.append(json.dumps({"video": video, "prompt": prompt, "answer": LETTERS[item.gold or 0]}))
        names.append(item.id)
    (task / "gaze.jsonl").write_text("\n".join(lines))
    values = TASK | {"dataset_kwargs": {"data_files": {"test": str(task / "gaze.jsonl")}}}
    (task / "gaze.yaml").write_text(yaml.safe_dump(values) + TASK_FUNCTIONS)
    (task / "utils.py").write_text(UTILS)
    model = f"pretrained={checkpoint.resolve()},mode={MODE},answer=text"
    command = [LMMS, "--model", "fvlm", "--model_args", model, "--device", "cpu", "--tasks", "gaze", "--include_path", task]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run([*command, "--output_path", folder / "lmms", "--log_samples"], env=environment, check=False, stdout=sys.stderr)
    samples = list((folder / "lmms").rglob("*_samples_gaze.jsonl"))
    if done.returncode or not samples:
        raise UserError("lmms-eval failed", where=" ".join(map(str, command)), fix="see its message above")
    said = [json.loads(line) for line in samples[0].read_text().splitlines()]
    return {names[one["doc_id"]]: one["filtered_resps"][0] for one in said}


def agreement(records: list[ItemRecord], said: dict[str, str]) -> str:
    """How lmms-eval's answers compare with ours, and the accuracy of both."""
    ours = {record.id: LETTERS[chosen(record, f"question_first/{MODE}", SCORER) or 0] for record in records}
    gold = {record.id: LETTERS[record.gold or 0] for record in records}
    same = sum(ours[name] == letter for name, letter in said.items())
    scores = [sum(gold[name] == letter for name, letter in answers.items()) / len(answers) for answers in (ours, said)]
    return f"lmms-eval, {MODE}: {same} of {len(said)} answers equal; accuracy {scores[1]:.4f}, `fvlm eval` {scores[0]:.4f}"


def table(found: dict[str, BenchmarkResult]) -> Table:
    """Accuracy by the likelihood of the option's text, by form and condition."""
    conditions = list(next(iter(found.values())).conditions)
    rows = [[name, *(number(result.conditions[one].by_scorer[SCORER]) for one in conditions)] for name, result in found.items()]
    first = next(iter(found.values()))
    note = f"{first.questions} questions about {first.clips} clips; chance {first.chance}, most frequent letter {first.majority}."
    return Table(title="The same questions in every form", head=["form", *conditions], rows=rows, note=note)


def items(clips: int) -> list[Item]:
    """The gaze benchmark's questions about its first clips."""
    return list(gaze.items(None, QUESTIONS * clips))


def write(folder: Path, form: str, clips: int) -> Path:
    """The gaze benchmark's clips as mp4 files, and its questions in the form of another benchmark."""
    for place in range(clips):
        file = folder / FORMS[form] / f"gaze-{place}.mp4"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_mp4(gaze.clip_of(place, scale=SCALE).frames))
    rows = [_row(item, form) for item in items(clips)]
    file = folder / ANNOTATIONS[form]
    file.parent.mkdir(parents=True, exist_ok=True)
    if form == "videomme":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text(json.dumps(rows))
    return folder


def _row(item: Item, form: str) -> dict[str, Any]:
    assert item.gold is not None
    if form == "videomme":
        about = {
            "video_id": "001",
            "duration": "short",
            "domain": "Knowledge",
            "sub_category": "Digits",
            "url": "",
            "task_type": "OCR Problems",
        }
        options = [f"{letter}. {text}" for letter, text in zip(LETTERS, item.choices, strict=False)]
        asked = {"videoID": item.clip, "question_id": item.id, "question": item.question, "options": options, "answer": LETTERS[item.gold]}
        return about | asked
    row = {"video": f"{item.clip}.mp4", "question": item.question, "candidates": item.choices, "answer": item.choices[item.gold]}
    return row | ({"duration": 3, "question_type": "count"} if form == "mlvu" else {})


if __name__ == "__main__":
    main()
