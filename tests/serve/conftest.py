"""One tiny model in the three forms that users have, and clips to show it."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from benchmarks.chat_server import data_url
from fvlm_core.config import Recipe
from fvlm_core.data import gaze
from fvlm_core.data.clips import encode_mp4
from fvlm_core.data.jobs import ShardManifest
from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
from fvlm_core.model.build import load_model
from fvlm_core.model.convert import to_original
from fvlm_core.release.hub_folder import write_hub_folder
from fvlm_core.serve.limits import Limits
from fvlm_core.serve.load import load
from tests.release.build import run as make_run
from tests.release.build import shards as make_shards

LIMITS = Limits(upload_mb=1, video_s=60, running=4, waiting=8, new_tokens=64, decode_s=20, pixels=1_000_000)
"""Of the servers that these tests start."""


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `run/`, a finished training run; `released/`, the folder for the hub; `original.safetensors`; `clip.mp4`."""
    root = tmp_path_factory.mktemp("serve")
    make_shards(root / "shards")
    run = make_run(root / "run", root / "shards")
    model = load_model(run / "model")
    recipe = Recipe.from_yaml(run / "recipe.yaml")
    write_hub_folder(root / "released", model, run / "model", recipe, ShardManifest.read(root / "shards"))
    save_file(to_original(model), root / "original.safetensors")
    model.encoder.to_dinov2().save_pretrained(root / "dinov2")
    model.llm.to_transformers().save_pretrained(root / "smollm2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "smollm2" / name).write_bytes((run / "model" / name).read_bytes())
    (root / "clip.mp4").write_bytes(clip(5))
    return root


@pytest.fixture(scope="session")
def answerer(root: Path) -> FoveatedAnswerer:
    return load(root / "run", "cpu")


@pytest.fixture(scope="session")
def pooled(root: Path) -> Path:
    """A baseline that does not look."""
    changes = {"model.query": "pooled", "model.fine_iterations": 0, "loss.fine": [], "model.tokens_per_frame": 4}
    return make_run(root / "pooled", root / "shards", **changes)


def clip(frames: int, seed: int = 0) -> bytes:
    """A video of that many seconds: digits in a grid, redrawn every second."""
    return encode_mp4(gaze.render(np.random.default_rng(seed), "val", frames=frames).frames)


@pytest.fixture(scope="module")
def url(root) -> str:
    return data_url((root / "clip.mp4").read_bytes())
