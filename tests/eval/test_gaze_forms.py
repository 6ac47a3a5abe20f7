"""`benchmarks.gaze_forms` and the model it makes, at the smallest size: it is taken again, and the table says what the records say."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import gaze_forms
from benchmarks.gaze_model import PLAN, described, found, trained
from fvlm_core.errors import UserError
from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
from fvlm_core.eval.checkpoints import open_checkpoint
from fvlm_core.eval.records import ConditionOutput, ItemRecord

TINY = replace(PLAN, steps=1, batch_samples=4, encoder_steps=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("gaze") / "model", TINY)


def test_a_trained_model_is_a_checkpoint_and_is_taken_again(model: Path):
    answerer = open_checkpoint(model, torch.device("cpu"))
    assert isinstance(answerer, FoveatedAnswerer)
    chat, encode = answerer.subject.chat, answerer.subject.encode
    assert chat.system, "the pipeline's chat format, with its system prompt"
    assert len(encode("Which digits are at the top left?")) <= 10, "its tokenizer knows the questions"
    before = (model / "model.safetensors").stat().st_mtime_ns
    assert trained(model, TINY) == model
    assert (model / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="something else than this model"):
        trained(model, replace(TINY, seed=1))
    assert re.search(r"trained with seed 0 for 1 steps of 4 clips", described(model))


def test_the_last_stage_of_a_volume_is_found(model: Path, tmp_path: Path):
    assert found(model) == model
    (tmp_path / "steps" / "stage1-abc" / "model").mkdir(parents=True)
    with pytest.raises(UserError, match="no stage of training is finished"):
        found(tmp_path)
    for stage in ("stage1-abc", "stage2-abc", "stage3-abc"):
        place = tmp_path / "steps" / stage / "model"
        place.mkdir(parents=True, exist_ok=True)
        (place / "settings.yaml").write_text("")
    assert found(tmp_path) == tmp_path / "steps" / "stage3-abc"


def test_the_command_asks_all_forms_and_draws_the_gap(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    gaze_forms.main([str(model), "--clips", "2", "--frames", "4", "2", "--drift-clips", "2", "--pictures", str(tmp_path)])
    text = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    rows = {line[0]: line[1:] for line in lines}
    assert rows["condition"] == ["gaze", "videomme", "mvbench", "mlvu"]
    assert len(set(rows["question_first/autoregressive"][1:])) == 1, "the same files and questions in three schemas"
    assert {"question_after/coarse_fine", "shuffled/autoregressive", "blind", "random_query"} <= set(rows)
    assert "18 questions about 2 clips" in text
    assert [line[0] for line in lines[-2:]] == ["2", "4"]
    assert Image.open(tmp_path / "drift.png").size[0] > 100


def test_the_table_counts_clips_and_compares_with_what_needs_no_video():
    """Twelve clips of nine questions: right wherever it sees, at random (by letter and blind: always the first option) elsewhere."""
    records = [record(clip, place) for clip in range(12) for place in range(9)]
    letters = {one.id: "ABCD"[one.gold or 0] for one in records[:-9]} | {one.id: "ABCD"[(one.gold or 0) - 1] for one in records[-9:]}
    table = gaze_forms.table({"gaze": records, "videomme": records}, "A model.", letters)
    rows = {row[0]: row[1:] for row in table.rows}
    first = np.mean([one.gold == 0 for one in records])
    assert rows["question_first/autoregressive"][0].startswith("1.000 [")
    assert rows["question_first/autoregressive, by lmms-eval"][0] == ""
    assert rows["question_first/autoregressive, by lmms-eval"][1].startswith(f"{11 / 12:.3f} [")
    assert rows["question_first/autoregressive, by the option's letter"][0].startswith(f"{first:.3f} [")
    difference, _, p_value = rows["question_first/autoregressive − blind"][0].partition(", p ")
    assert difference.startswith(f"{1 - first:.3f} [")
    assert float(p_value) < 0.01
    assert rows["best without a video"][0].startswith(f"{max(np.bincount([one.gold or 0 for one in records])) / len(records):.3f}")
    assert "99 of 108 answers are equal" in table.note


def record(clip: int, place: int) -> ItemRecord:
    gold = (clip + place) % 4 if place else 0
    seen = [(-1.0 if option == gold else -5.0, 3, -0.1) for option in range(4)]
    blind = [(-1.0 - option, 3, -0.1) for option in range(4)]
    said = {
        gaze_forms.MAIN: ConditionOutput(options=seen, letters=[0.0, -1.0, -2.0, -3.0]),
        "blind": ConditionOutput(options=blind, letters=[0.0, -1.0, -2.0, -3.0]),
    }
    values = {"id": f"{clip}/{place}", "clip": str(clip), "groups": {}, "choices": ["1", "2", "3", "4"], "gold": gold, "said": said}
    return ItemRecord.model_validate(json.loads(json.dumps(values, default=lambda one: one.model_dump())))
