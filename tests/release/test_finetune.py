"""The example of fine-tuning with transformers' Trainer and TRL: the loss falls, and what it saves is a released folder again."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from fvlm_core.config import Recipe
from fvlm_core.data import gaze
from fvlm_core.data.clips import encode_mp4
from fvlm_core.data.jobs import ShardManifest
from fvlm_core.model.build import load_model
from fvlm_core.release.hub_folder import write_hub_folder
from tests.release.build import run, shards

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "finetune.py"
STEPS = 12

pytestmark = pytest.mark.slow(reason="trains")


@pytest.mark.parametrize("with_trl", [False, True])
def test_the_loss_falls_and_the_result_loads_as_a_stranger_would(tmp_path, with_trl):
    shards(tmp_path / "shards")
    made = run(tmp_path / "run", tmp_path / "shards")
    recipe, manifest = Recipe.from_yaml(made / "recipe.yaml"), ShardManifest.read(tmp_path / "shards")
    write_hub_folder(tmp_path / "released", load_model(made / "model"), made / "model", recipe, manifest)
    rows = []
    for number in range(4):
        clip = gaze.render(np.random.default_rng(number), "train", frames=2)
        (tmp_path / f"{number}.mp4").write_bytes(encode_mp4(clip.frames))
        rows.append({"video": f"{number}.mp4", "question": "Describe the video.", "answer": f"A red {number}."})
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    example = runpy.run_path(str(EXAMPLE))
    data, output = tmp_path / "clips.jsonl", tmp_path / "tuned"
    trainer = example["finetune"](str(tmp_path / "released"), data, output, steps=STEPS, batch=4, rate=3e-3, with_trl=with_trl)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert losses[-1] < 0.6 * losses[0]
    again = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    assert {path.name for path in (tmp_path / "released").glob("*.py")} <= {path.name for path in output.glob("*.py")}
    batch = example["Collator"](processor)(example["conversations"](data))
    learned = trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(again(**batch, mode="fine").logits, learned(**batch, mode="fine").logits)
        assert again(**batch, mode="fine").loss < losses[0]
