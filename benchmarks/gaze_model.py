"""A model folder for `benchmarks.gaze_forms`: a model that has learned the gaze benchmark.

Either it is trained here, by the plan of `benchmarks.gaze` with the pipeline's wording and chat format, so that the questions are those of
`fvlm eval --benchmarks gaze`; or it comes from a run of `./speedrun.sh`.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gaze_training import Plan, train
from fvlm_core.errors import UserError
from fvlm_core.manifest import write_atomically
from fvlm_core.model.build import SETTINGS_FILE, save_model
from fvlm_core.train.jobs import MODEL_FOLDER

RECORD = "gaze_training.json"
"""File beside the weights: the plan and a summary of the training."""


PLAN = Plan(task="cell", wording="sentence", steps=750, encoder_steps=1400, copies=0, vision_learning_rate=2e-3)
"""Shorter than the plan of `benchmarks.gaze`, because a step costs about twice as much here (questions are sentences in a chat). The
encoder has the same learning rate as the rest."""


def trained(folder: Path, plan: Plan, say: Callable[[str], None] = lambda _: None) -> Path:
    """Train a model into `folder`, or reuse the model that the same plan left there.

    Raises UserError if the folder holds anything else.
    """
    wanted = json.loads(json.dumps(asdict(plan)))
    if folder.exists() and any(folder.iterdir()):
        if _record(folder).get("plan") != wanted:
            raise UserError("the folder holds something else than this model", where=str(folder), fix="give another folder, or remove it")
        return folder
    done = train(plan, say)
    with TemporaryDirectory() as place:
        done.asker.tokenizer.save_pretrained(place)
        save_model(done.subject.model, folder, tokenizer=Path(place))
    how = {
        "steps": done.steps,
        "clutter": done.clutter,
        "full_clutter_at": done.full_at,
        "cpu_s": round(done.cpu_s + done.encoder_cpu_s, 1),
    }
    write_atomically(folder / RECORD, json.dumps({"plan": wanted} | how, indent=2).encode())
    return folder


def found(place: Path) -> Path:
    """Return `place` if it is a checkpoint; if it is a volume of `./speedrun.sh`, the newest model of its last finished stage.

    Raises UserError for a volume on which no stage has finished.
    """
    if not (place / "steps").is_dir():
        return place
    stages = [folder for folder in (place / "steps").glob("stage*-*") if (folder / MODEL_FOLDER / SETTINGS_FILE).is_file()]
    if not stages:
        raise UserError("no stage of training is finished on this volume", where=str(place), fix="./speedrun.sh --volume " + str(place))
    return max(stages, key=lambda folder: (folder.name.partition("-")[0], folder.stat().st_mtime))


def described(model: Path) -> str:
    """Describe a model's training for the note of a table; a model that was not trained here is described by its name."""
    record = _record(model)
    if not record:
        return f"Model: {model.name}."
    plan = record["plan"]
    steps = f"{record['steps']} steps of {plan['batch_samples']} clips"
    return f"Model: trained with seed {plan['seed']} for {steps}, {record['cpu_s']:.0f} s of one core."


def _record(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
