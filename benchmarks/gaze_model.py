"""A model that has learned the gaze benchmark, as a folder that everything takes which takes a model: trained by the plan of
`benchmarks.gaze` with the pipeline's wording and chat format, so its questions are those of `fvlm eval --benchmarks gaze`; or one of a run
of `./speedrun.sh`.
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
"""Beside the weights: the plan, and how the training went."""


PLAN = Plan(task="cell", wording="sentence", steps=750, encoder_steps=1400, copies=0, vision_learning_rate=2e-3)
"""Shorter than that of `benchmarks.gaze`, because here a step costs about twice as much (questions are sentences in a chat), and with an
encoder that learns as fast as the rest."""


def trained(folder: Path, plan: Plan, say: Callable[[str], None] = lambda _: None) -> Path:
    """Train a model into `folder`, or take the one that the same plan has left there.

    Raises UserError where the folder holds something else.
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
    """A checkpoint, or the model of the last stage of the newest training on a volume of `./speedrun.sh`.

    Raises UserError for a volume on which no stage is finished.
    """
    if not (place / "steps").is_dir():
        return place
    stages = [folder for folder in (place / "steps").glob("stage*-*") if (folder / MODEL_FOLDER / SETTINGS_FILE).is_file()]
    if not stages:
        raise UserError("no stage of training is finished on this volume", where=str(place), fix="./speedrun.sh --volume " + str(place))
    return max(stages, key=lambda folder: (folder.name.partition("-")[0], folder.stat().st_mtime))


def described(model: Path) -> str:
    """What is known of a model's training, for the note of a table; of one that was not trained here, its name."""
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
