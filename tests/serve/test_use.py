"""The three lines of Python: whatever a user has, the same answers."""

import subprocess
import sys
from shutil import copytree

import numpy as np
import pytest
import yaml

from fvlm_core import FoveatedVLM
from fvlm_core.errors import UserError
from fvlm_core.eval.jobs import CheckpointJob
from fvlm_core.serve.batched_decoding import Sampling
from fvlm_core.serve.evaluate import evaluate_checkpoint
from fvlm_core.serve.load import load
from fvlm_core.serve.session import Session, open_media


@pytest.mark.parametrize("form", ["released", "run", "original.safetensors"])
def test_every_form_of_a_model_answers_as_the_session_does(root, answerer, form):
    options = {"vision": str(root / "dinov2"), "llm": str(root / "smollm2"), "frame_px": 42} if form.startswith("original") else {}
    model = FoveatedVLM.from_pretrained(root / form, device="cpu", **options)
    session = Session(answerer, open_media(root / "clip.mp4", answerer))
    for name, mode in (("coarse", "coarse_only"), ("fine", "coarse_fine"), ("autoregressive", "autoregressive")):
        expected = "".join(session.ask("Which digits?", mode=mode, question_first=True, sampling=Sampling(6)))
        assert model.ask(root / "clip.mp4", "Which digits?", mode=name, max_new_tokens=6) == expected.strip()
    maps = model.gaze(root / "clip.mp4", "Which digits?")
    assert len(maps) == 5
    np.testing.assert_allclose(maps.sum((1, 2)), 1, rtol=1e-5)


def test_what_a_model_says_itself_is_not_said_of_it(root):
    with pytest.raises(UserError, match="leave out --vision, --frame-px"):
        FoveatedVLM.from_pretrained(root / "run", device="cpu", vision=str(root / "dinov2"), frame_px=42)
    with pytest.raises(UserError, match="leave out --llm"):
        FoveatedVLM.from_pretrained(root / "released", device="cpu", llm=str(root / "smollm2"))


def test_a_release_is_evaluated_as_the_run_that_it_was_made_of(root, tmp_path):
    benchmarks = {"run": ["gaze"], "limit": 4, "ask": {"modes": ["coarse_fine"]}}
    found = []
    for form in ("released", "run"):
        values = {"checkpoint": root / form, "output": tmp_path / form, "benchmarks": benchmarks, "latency": {"clips": 0}, "device": "cpu"}
        results = evaluate_checkpoint(CheckpointJob.from_values(values, where="the test"))
        assert results is not None
        found.append(results)
    assert found[0].parts == found[1].parts
    assert found[0].frame_px == found[1].frame_px


def test_int8_weights_answer_too(root):
    """They look where the others look, nearly."""
    full, small = (FoveatedVLM.from_pretrained(root / "run", device="cpu", int8=int8) for int8 in (False, True))
    assert isinstance(small.ask(root / "clip.mp4", "Which digits?", max_new_tokens=4), str)
    maps = [model.gaze(root / "clip.mp4", "Which digits?") for model in (full, small)]
    assert not np.array_equal(*maps)
    np.testing.assert_allclose(*maps, atol=0.02)


def test_a_released_model_is_called_what_its_card_says(root, tmp_path):
    folder = copytree(root / "released", tmp_path / "model")
    assert load(folder, "cpu").name == "model"
    task = {"type": "video-text-to-text"}
    result = {"task": task, "dataset": {"type": "d", "name": "D"}, "metrics": [{"type": "loss", "value": 1.5}]}
    card = yaml.safe_dump({"model-index": [{"name": "fVLM-tiny", "results": [result]}]})
    (folder / "README.md").write_text(f"---\n{card}---\n# A card\n")
    assert load(folder, "cpu").name == "fVLM-tiny"


def test_what_cannot_be_asked_is_named(root):
    model = FoveatedVLM.from_pretrained(str(root / "run"), device="cpu")
    with pytest.raises(UserError, match="no mode 'sharp'"):
        model.ask(root / "clip.mp4", "What?", mode="sharp")
    with pytest.raises(UserError, match="no such file"):
        model.ask(root / "no.mp4", "What?")


def test_importing_the_package_imports_nothing_large():
    code = "import sys, fvlm_core; print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
