"""Verify that a released folder works without this project: a clean process must compute the same logits, bit for bit."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from fvlm_core.config import Recipe
from fvlm_core.data.batch import PackedBatch, Sample, Turn, pack
from fvlm_core.data.loader import val_batches
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.data.tokenizer import END_OF_TEXT
from fvlm_core.errors import UserError
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.inference import generate, logits
from fvlm_core.release import clean_check
from fvlm_core.release.hub.padded import NO_FRAME

BATCH_SAMPLES = 4
QUESTIONS = 2
"""Clips for which the released processor must produce the same inputs as this project."""
MAX_NEW_TOKENS = 8
"""Length of the answers on which transformers' generation must agree with this project's."""
TIMEOUT_S = 900


def verify(folder: Path, model: FoveatedVLM, shards: ShardSet, recipe: Recipe, samples: int) -> dict[str, int]:
    """Return the number of equal logits per mode. Raises UserError if any differ or the folder does not load."""
    with TemporaryDirectory(prefix="fvlm-verify-") as temporary:
        expected = Path(temporary) / "expected"
        expected.mkdir()
        _write_logits(expected, model, shards, recipe, samples)
        _write_questions(expected, model, shards)
        report = _in_clean_process(folder, expected, Path(temporary))
    problems = report["problems"] + (["the project was imported"] if report["project_imported"] else [])
    problems += [f"{mode}: nothing was compared" for mode in model.modes if not report["equal"].get(mode)]
    if problems:
        raise UserError(
            f"the released model gives other results in a clean process: {'; '.join(problems)}",
            where=str(folder),
            fix="report this with the versions of torch and transformers; nothing was released",
        )
    return report["equal"]


def _write_logits(folder: Path, model: FoveatedVLM, shards: ShardSet, recipe: Recipe, samples: int) -> None:
    """Write inputs and logits of validation samples."""
    k = model.settings.tokens_per_frame
    batches = val_batches(shards, samples, recipe.data, tokens_per_frame=k, batch_samples=BATCH_SAMPLES)
    for number, batch in enumerate(batches):
        tensors = {f"inputs.{name}": tensor for name, tensor in padded_inputs(batch).items()}
        tensors |= {f"logits.{mode}": logits(model, batch, mode) for mode in model.modes}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"batch-{number:03d}.safetensors")


def _write_questions(folder: Path, model: FoveatedVLM, shards: ShardSet) -> None:
    """Write questions and clips as a user has them, with the expected inputs and answers."""
    asked = []
    rows = shards.rows("val")
    videos = rows.index[(rows["kind"] == "video").to_numpy()]
    for number, row in enumerate(videos[:QUESTIONS]):
        conversation = rows["conversation"].to_numpy()[rows.index.get_loc(row)]
        text = shards.record(row)["conversations"][conversation][0]["question"]
        sample = shards.read(row, image_repeats=1, question_first=bool(number % 2))
        open_ended: Sample = replace(sample, turns=[Turn(sample.turns[0].question_ids, [])])
        batch = pack([open_ended], shards.chat, tokens_per_frame=model.settings.tokens_per_frame)
        name = f"question-{number}.tensors"
        placeholder: Any = shards.tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        save_file(padded_inputs(batch, placeholder) | {"video": torch.from_numpy(sample.frames)}, folder / name)
        stop = shards.chat.assistant_close[:1]
        answers = {mode: generate(model, batch, mode, max_new_tokens=MAX_NEW_TOKENS, stop_ids=stop)[0] for mode in model.modes}
        asked.append({"file": name, "question": text, "question_first": sample.question_first, "answers": answers})
    (folder / "questions.json").write_text(json.dumps(asked))


def padded_inputs(batch: PackedBatch, placeholder: int = 0) -> dict[str, torch.Tensor]:
    """Convert a packed batch to the released model's left-padded inputs; `placeholder` is the token id in a visual token's place."""
    shape, k = (batch.n_samples, max(batch.lengths)), batch.visual_positions.shape[1]
    frame_ids, offsets = torch.full_like(batch.input_ids, NO_FRAME), torch.zeros_like(batch.input_ids)
    frame_ids[batch.visual_positions] = batch.shown_frames[:, None].expand(-1, k)
    offsets[batch.visual_positions] = torch.where(batch.query_sources >= 0, batch.visual_positions - batch.query_sources, 0)
    flat = {"input_ids": batch.input_ids.clone(), "frame_ids": frame_ids, "query_offsets": offsets}
    flat["input_ids"][batch.visual_positions.flatten()] = placeholder
    mask = torch.arange(shape[1]) >= shape[1] - torch.tensor(batch.lengths)[:, None]
    made = {"frames": batch.frames, "attention_mask": mask.long()}
    for name, values in flat.items():
        made[name] = torch.full(shape, NO_FRAME if name == "frame_ids" else 0)
        made[name][mask] = values
    return made


def _in_clean_process(folder: Path, expected: Path, temporary: Path) -> dict:
    """Run `clean_check` in an isolated interpreter, offline, with its own caches and working directory; returns its report."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "TRANSFORMERS_"))}
    caches = {"HF_HOME": str(temporary / "hub"), "HF_MODULES_CACHE": str(temporary / "modules"), "HF_HUB_OFFLINE": "1"}
    threads = str(torch.get_num_threads())  # sums depend on how they are split over threads, down to the last bit
    command = [sys.executable, "-I", str(Path(clean_check.__file__).resolve()), str(folder.resolve()), str(expected)]
    environment = kept | caches | {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=temporary, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise UserError(
            f"the released folder does not load in a clean process:\n{done.stderr.strip()[-2000:]}",
            where=str(folder),
            fix="report this with the versions of torch and transformers; nothing was released",
        )
    return json.loads(done.stdout.strip().splitlines()[-1])
