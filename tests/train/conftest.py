"""Tiny shards for the room, and recipes that train a very small model on them in a second."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fvlm_core.config import Recipe
from tests.tiny import tiny_shards

# torch logs every tensor it saves, and pytest would keep it all
logging.getLogger("c10d-NullHandler-dcp_logger").disabled = True


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_shards(tmp_path_factory.mktemp("train") / "shards", clips=8)


def tiny_recipe(output: Path, shards: Path, **changes: Any) -> Recipe:
    """A recipe of 6 steps; `changes` are dotted paths with two underscores for the dot: `run__steps=3`."""
    recipe = Recipe.from_values(
        {
            "name": "tiny",
            "output": output,
            "shards": shards,
            "model": {
                "vision": {"shape": {"width": 16, "layers": 2, "heads": 2}, "frame_px": 42},
                "llm": {"shape": {"width": 24, "layers": 2, "heads": 2, "kv_heads": 1, "mlp_width": 48, "context": 512}},
            },
            "data": {
                "mixture": [
                    {"source": "gaze_cell", "share": 0.4},
                    {"source": "gaze_image", "share": 0.2},
                    {"source": "text", "share": 0.4},
                ],
                "image_repeats": 2,
            },
            "optimizer": {"lr_connector": 3e-3, "lr_vision": 1e-3, "lr_llm": 2e-3, "warmup_steps": 2},
            "run": {
                "steps": 6,
                "batch_samples": 8,
                "micro_batch_samples": 8,
                "eval_every": 1,
                "eval_samples": 8,
                "checkpoint_every": 2,
                "wandb": "disabled",
                "device": "cpu",
            },
        },
        where="tests",
    )
    return recipe.with_changes({key.replace("__", "."): value for key, value in changes.items()})
