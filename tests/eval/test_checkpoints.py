"""Checkpoints of every form through the same items, by the command `fvlm eval`."""

import shutil
from pathlib import Path

import pytest
import torch

from deployments.evaluate import evaluate
from fvlm_core.data.frame_sampling import FRAME_SAMPLING_FILE, FrameSampling
from fvlm_core.data.frames import FrameRule
from fvlm_core.data.jobs import TOKENIZER_FOLDER
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.errors import UserError
from fvlm_core.eval.checkpoints import open_checkpoint
from fvlm_core.eval.records import ItemRecord
from fvlm_core.eval.results import Results
from fvlm_core.model.build import load_model, save_model
from fvlm_core.model.convert import convert_to_original
from fvlm_core.model.names import MODES
from tests.eval.conftest import make_run

QUESTIONS = 9


@pytest.fixture(scope="module")
def folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ours/`, a model of ours with one fine pass, as the original has; `original.safetensors`, the same; its backbones' folders."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = load_model(make_run(folder / "run", shards, fine_iterations=1) / "model")
    save_model(model, folder / "ours", tokenizer=ShardSet(shards).folder / TOKENIZER_FOLDER)
    convert_to_original(folder / "ours", folder / "original.safetensors")
    model.encoder.config.save_pretrained(folder / "dinov2")
    model.llm.config.save_pretrained(folder / "smollm2")
    for file in (shards / TOKENIZER_FOLDER).iterdir():
        (folder / "smollm2" / file.name).write_bytes(file.read_bytes())
    return folder


def asked(checkpoint: Path, output: Path, **options: object) -> tuple[Results, list[ItemRecord]]:
    """What the command leaves."""
    assert evaluate(checkpoint=checkpoint, benchmarks="gaze", output=output, limit=QUESTIONS, device="cpu", **options) == 0
    lines = [line for file in sorted((output / "items" / "gaze").glob("*.jsonl")) for line in file.read_text().splitlines()[1:]]
    return Results.read(output), [ItemRecord.model_validate_json(line) for line in lines]


def test_a_checkpoint_of_the_original_gets_the_numbers_of_the_same_model_of_ours(folder: Path, tmp_path: Path):
    backbones = {"vision": str(folder / "dinov2"), "llm": str(folder / "smollm2"), "frame_px": 42}
    results, theirs = asked(folder / "original.safetensors", tmp_path / "theirs", **backbones)
    _, ours = asked(folder / "ours", tmp_path / "ours")
    assert (results.run, results.modes, results.tokens_per_frame, results.looks) == ("original", list(MODES), 1, True)
    assert len(theirs) == len(ours) == QUESTIONS
    for one, other in zip(theirs, ours, strict=True):
        assert (one.id, list(one.said)) == (other.id, list(other.said))
        for condition, said in one.said.items():
            assert said.letters == pytest.approx(other.said[condition].letters, abs=1e-3)
            for row, expected in zip(said.options, other.said[condition].options, strict=True):
                assert row == pytest.approx(expected, abs=1e-3)


def test_a_model_is_shown_the_frames_that_it_was_trained_with(folder: Path, tmp_path: Path):
    shown = FrameSampling(frame_px=42, fps=2.0, max_frames=12, image_repeats=3)
    shown.to_yaml(shutil.copytree(folder / "ours", tmp_path / "model") / FRAME_SAMPLING_FILE)
    opened = open_checkpoint(tmp_path / "model", torch.device("cpu"))
    assert (opened.rule, opened.image_repeats) == (FrameRule(42, 2.0, 12), 3)


def test_a_checkpoint_of_the_original_has_to_fit_its_backbones(folder: Path, shards: Path, tmp_path: Path):
    with pytest.raises(UserError, match="does not say what it was built with"):
        asked(folder / "original.safetensors", tmp_path)
    other = make_run(tmp_path / "wider", shards, llm={"shape": {"width": 96, "layers": 2, "heads": 2, "kv_heads": 1, "mlp_width": 96}})
    load_model(other / "model").llm.config.save_pretrained(tmp_path / "wider-llm")
    for file in (shards / TOKENIZER_FOLDER).iterdir():
        (tmp_path / "wider-llm" / file.name).write_bytes(file.read_bytes())
    backbones = {"vision": str(folder / "dinov2"), "llm": str(tmp_path / "wider-llm"), "frame_px": 42}
    with pytest.raises(UserError, match="of another size"):
        asked(folder / "original.safetensors", tmp_path, **backbones)
    assert not (tmp_path / "items").exists(), "before any item is asked"
