"""An end-to-end check of the evaluation: the gaze benchmark's questions in the schemas of Video-MME, MVBench and MLVU, with real mp4 files.

`fvlm eval` asks them to a model that has learned the task; `--lmms` also runs lmms-eval's own program and compares its answers question by
question. The model must score far above blind, and equally well in all schemas (`forms`), on the code path of a published benchmark. If no
model is given, one is trained in about five minutes of one core.

    python -m benchmarks.gaze_forms --lmms                     # train, write the files, evaluate, compare
    python -m benchmarks.gaze_forms --keep DIR --seed 1        # another seed; keep the model in DIR and reuse it next time
    python -m benchmarks.gaze_forms MODEL                      # a checkpoint, or the volume of ./speedrun.sh
    python -m benchmarks.gaze_forms MODEL --frames 8 16 32 64  # also the gap between inference and training as clips get longer
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from rich.console import Console

from benchmarks.gaze_model import PLAN, described, found, trained
from fvlm_core.data.clips import encode_mp4
from fvlm_core.errors import UserError
from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
from fvlm_core.eval.benchmark_result import chosen
from fvlm_core.eval.benchmarks import gaze
from fvlm_core.eval.benchmarks.benchmark import LETTERS
from fvlm_core.eval.checkpoints import open_checkpoint
from fvlm_core.eval.items import Item
from fvlm_core.eval.jobs import CheckpointJob
from fvlm_core.eval.parts.drift import DriftResult, drift_of
from fvlm_core.eval.records import ItemRecord
from fvlm_core.eval.stats import Bootstrap, holm, sign_flip
from fvlm_core.serve.evaluate import evaluate_checkpoint
from fvlm_core.tables import Table, number

FORMS = {"videomme": "data", "mvbench": "video/clevrer/video_validation", "mlvu": "video/count"}
"""Folder of the videos in each form."""
ANNOTATIONS = {"videomme": "videomme/test-00000-of-00001.parquet", "mvbench": "json/moving_count.json", "mlvu": "json/count.json"}
QUESTIONS = 9
"""Per clip."""
SCALE = 4
"""Enlargement of the clips in the files: 168 px."""
GAZE, LMMS_FORM = "gaze", "videomme"
MODE, SCORER = "autoregressive", "mean"
MAIN = f"question_first/{MODE}"
RESAMPLES = 2000
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a model if none is given, write the files, evaluate and print."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    console = Console()
    with TemporaryDirectory() as place:
        folder = Path(place)
        if options.model is None:
            plan = replace(PLAN, seed=options.seed, steps=options.steps, max_cpu_s=60 * options.minutes)
            model = trained(options.keep or folder / "model", plan, lambda text: console.print(text, markup=False, highlight=False))
        else:
            model = found(options.model)
        records = by_fvlm(model, folder, options.clips)
        letters = by_lmms(model, folder, options.clips) if options.lmms else None
        console.print(table(records, described(model), letters).markdown(), markup=False, highlight=False, soft_wrap=True)
        if options.frames:
            gaps = drift(model, options.pictures, options.drift_clips, options.frames)
            console.print(gaps.tables()[0].markdown(), markup=False, highlight=False, soft_wrap=True)


def by_fvlm(checkpoint: Path, folder: Path, clips: int) -> dict[str, list[ItemRecord]]:
    """Evaluate every form with `fvlm eval`; return the records by form, including the gaze benchmark itself."""
    data = {form: write(folder / form, form, clips) for form in FORMS}
    benchmarks = {"run": [GAZE, *FORMS], "data": data, "limit": QUESTIONS * clips}
    job = {"output": folder / "out", "checkpoint": checkpoint, "benchmarks": benchmarks, "device": "cpu", "latency": {"clips": 0}}
    evaluate_checkpoint(CheckpointJob.model_validate(job))
    records = {}
    for form in (GAZE, *FORMS):
        shards = sorted((folder / "out" / "items" / form).glob("*.jsonl"))
        records[form] = [ItemRecord.model_validate_json(line) for shard in shards for line in shard.read_text().splitlines()[1:]]
    return records


def by_lmms(checkpoint: Path, folder: Path, clips: int) -> dict[str, str]:
    """Evaluate with lmms-eval in `MODE`, choosing by the option's text; return letters by question id. Raises UserError on failure."""
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


def table(records: dict[str, list[ItemRecord]], about: str, letters: dict[str, str] | None = None) -> Table:
    """Return the accuracy by form in every condition, by the likelihood of the option's text, next to baselines that need no video.

    `letters` are lmms-eval's answers to the Video-MME form in `MODE`. The clip is the unit of intervals and tests.
    """
    bootstrap = Bootstrap(RESAMPLES, 0)
    asked = next(iter(records.values()))
    rights = {form: {name: right(some, name, SCORER) for name in some[0].said} for form, some in records.items()}
    clips = {form: [record.clip for record in some] for form, some in records.items()}
    rows = []
    for name in asked[0].said:
        rows.append([name, *(number(bootstrap.share(of[name], clips[form])) for form, of in rights.items())])
    if letters is not None:
        said = [letters[record.id] == LETTERS[record.gold or 0] for record in records[LMMS_FORM]]
        share = number(bootstrap.share(said, clips[LMMS_FORM]))
        rows.append([f"{MAIN}, by lmms-eval", *(share if form == LMMS_FORM else "" for form in records)])
    by_letter = {form: number(bootstrap.share(right(some, MAIN, "letter"), clips[form])) for form, some in records.items()}
    rows.append([f"{MAIN}, by the option's letter", *by_letter.values()])
    gains = {form: of[MAIN].astype(float) - of["blind"] for form, of in rights.items()}
    p_values = holm([sign_flip(gain, clips[form]) for form, gain in gains.items()])
    cells = [f"{number(bootstrap.mean(gain, clips[form]))}, p {p:.2g}" for (form, gain), p in zip(gains.items(), p_values, strict=True)]
    rows.append([f"{MAIN} − blind", *cells])
    rows.append(["best without a video", *(trivial(some, of["blind"]) for some, of in zip(records.values(), rights.values(), strict=True))])
    note = f"{about} {len(asked)} questions about {len(set(clips[GAZE]))} clips with digits of writers that training never saw; "
    note += "95 % intervals over clips; p: paired sign flips by clip, adjusted by Holm for the forms."
    if letters is not None:
        ours = {record.id: LETTERS[chosen(record, MAIN, SCORER) or 0] for record in records[LMMS_FORM]}
        note += f" lmms-eval: {sum(ours[name] == letter for name, letter in letters.items())} of {len(letters)} answers are equal to ours."
    return Table(title="The same questions in every form", head=["condition", *records], rows=rows, note=note)


def right(records: Sequence[ItemRecord], condition: str, scorer: str) -> np.ndarray:
    """Return which questions were answered correctly: bool [N]."""
    return np.array([chosen(record, condition, scorer) == record.gold for record in records])


def trivial(records: Sequence[ItemRecord], blind: np.ndarray) -> str:
    """Return the best baseline that needs no video: chance, the most frequent letter, or the model without frames."""
    golds = [record.gold or 0 for record in records]
    found = {
        "chance": float(np.mean([1 / len(record.choices) for record in records])),
        "most frequent letter": max(map(golds.count, golds)) / len(golds),
        "blind": float(blind.mean()),
    }
    best = max(found, key=lambda name: found[name])
    return f"{found[best]:.3f} ({best})"


def drift(model: Path, pictures: Path, clips: int, frames: Sequence[int]) -> DriftResult:
    """Measure the gap between autoregressive inference and the parallel pass of training by clip length; plot it in `pictures`."""
    answerer = open_checkpoint(model, torch.device("cpu"))
    if not isinstance(answerer, FoveatedAnswerer) or not answerer.subject.gazes:
        raise UserError("only a model that looks somewhere has this gap", where=str(model), fix="leave --frames out")
    return drift_of(answerer, answerer.subject.model.modes, Bootstrap(RESAMPLES, 0), pictures, clips=clips, frames=frames)


def items(clips: int) -> list[Item]:
    """Return the gaze benchmark's questions about its first `clips` clips."""
    return list(gaze.items(None, QUESTIONS * clips))


def write(folder: Path, form: str, clips: int) -> Path:
    """Write the gaze benchmark's clips as mp4 files and its questions in the schema of another benchmark; returns `folder`."""
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


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="checkpoint for `fvlm eval`, or a volume; by default a model is trained")
    parser.add_argument("--keep", type=Path, help="folder for the trained model; reused if it already holds one")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--steps", type=int, default=PLAN.steps, help="of the training")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="limit on the CPU time of the training")
    parser.add_argument("--clips", type=int, default=64, help="clips, with nine questions each")
    parser.add_argument("--lmms", action="store_true", help="also evaluate with lmms-eval (needs ./infra/lmms_env.sh)")
    parser.add_argument("--frames", type=int, nargs="+", default=[], help="also measure the inference-training gap at these lengths")
    parser.add_argument("--drift-clips", type=int, default=32, help="clips of each length in --frames")
    parser.add_argument("--pictures", type=Path, default=Path(), help="folder for the figure of the gap")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
