"""A tiny run on tiny shards, made once for all tests of the package."""

from pathlib import Path

import pytest
import torch

from fvlm_core.config import (
    DataSettings,
    LLMSettings,
    LLMShape,
    LossSettings,
    ModelSettings,
    Recipe,
    RunSettings,
    SourceShare,
    VisionSettings,
    VisionShape,
)
from fvlm_core.data.frame_sampling import FRAME_SAMPLING_FILE, FrameSampling
from fvlm_core.data.frames import FrameRule
from fvlm_core.data.jobs import TOKENIZER_FOLDER
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
from fvlm_core.eval.evaluate import load_subject
from fvlm_core.eval.jobs import EvalJob
from fvlm_core.eval.part import Context
from fvlm_core.eval.stats import Bootstrap
from fvlm_core.eval.subject import Subject
from fvlm_core.eval.validation import ValidationSplit
from fvlm_core.manifest import file_entries
from fvlm_core.model.build import build_model, save_model
from fvlm_core.model.names import MODES
from fvlm_core.train.jobs import RunManifest
from tests.tiny import tiny_shards

IMAGE_REPEATS = 2


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_shards(tmp_path_factory.mktemp("eval") / "shards", clips=8)


def make_run(folder: Path, shards: Path, **model: object) -> Path:
    """What a finished training run leaves, with random weights."""
    settings = ModelSettings.model_validate(
        {
            "vision": VisionSettings(shape=VisionShape(width=32, layers=2, heads=2, patch_px=14), frame_px=42),
            "llm": LLMSettings(shape=LLMShape(width=48, layers=2, heads=2, kv_heads=1, mlp_width=96)),
            **model,
        }
    )
    save_model(build_model(settings, vocab_size=ShardSet(shards).manifest.vocab_size, seed=1), folder / "model")
    FrameSampling.of_training(ShardSet(shards).manifest, IMAGE_REPEATS).to_yaml(folder / "model" / FRAME_SAMPLING_FILE)
    Recipe(
        name="tiny",
        output=folder,
        shards=shards,
        model=settings,
        data=DataSettings(mixture=[SourceShare(source="gaze_cell", share=1.0)], image_repeats=IMAGE_REPEATS),
        loss=LossSettings(fine=[1.0] * settings.fine_iterations),
        run=RunSettings(steps=1),
    ).to_yaml(folder / "recipe.yaml")
    losses = dict.fromkeys(["coarse", *(f"fine{number + 1}" for number in range(settings.fine_iterations))], 6.0)
    RunManifest(
        name="train",
        settings_hash="tiny",
        files=file_entries(folder, ["model/*", "recipe.yaml"]),
        steps=2,
        model_step=1,
        final_loss=6.0,
        losses=losses,
        best_step=1,
        best_loss=6.0,
        samples_seen=16,
        frames_seen=48,
        label_tokens_seen=100,
        flops=1e9,
        params=1000,
    ).write(folder)
    return folder


@pytest.fixture(scope="session")
def run(shards: Path) -> Path:
    return make_run(shards.parent / "run", shards)


def small_job(run: Path, shards: Path, output: Path, **changes: object) -> EvalJob:
    values: dict[str, object] = {
        "losses": {"samples": 24},
        "captions": {"samples": 6, "max_new_tokens": 8},
        "multiple_choice": {"questions": 12},
        "question_order": {"questions": 8},
        "gaze": {"heatmaps": 2},
        "drift": {"clips": 2, "frames": [4]},
        "latency": {"clips": 2},
        "benchmarks": {"run": ["gaze"], "limit": 12},
        "resamples": 100,
    }
    return EvalJob.model_validate({"output": output, "run": run, "shards": shards, "device": "cpu", **values, **changes})


@pytest.fixture(scope="session")
def subject(run: Path, shards: Path) -> Subject:
    return load_subject(small_job(run, shards, run, batch_samples=16))


@pytest.fixture(scope="session")
def answerer(subject: Subject) -> FoveatedAnswerer:
    return FoveatedAnswerer(subject, name="tiny", checkpoint="tiny", rule=FrameRule(42), image_repeats=IMAGE_REPEATS)


@pytest.fixture(scope="session")
def context(subject: Subject, answerer: FoveatedAnswerer, split: ValidationSplit, shards: Path) -> Context:
    return Context(subject, answerer, split, list(MODES), bootstrap=Bootstrap(50, 0), output=shards.parent / "pictures")


@pytest.fixture(scope="session")
def split(shards: Path) -> ValidationSplit:
    return ValidationSplit(ShardSet(shards), image_repeats=IMAGE_REPEATS, seed=0)


@pytest.fixture(scope="session")
def model_folder(run: Path, shards: Path) -> Path:
    """The run's model as a folder of its own, with its tokenizer."""
    folder = shards.parent / "tiny-model"
    folder.mkdir()
    for file in [*(run / "model").iterdir(), *(shards / TOKENIZER_FOLDER).iterdir()]:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
