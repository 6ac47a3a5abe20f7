"""Folders of finished runs with chosen numbers, for everything that compares runs."""

from pathlib import Path
from typing import Any

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
from fvlm_core.manifest import file_entries
from fvlm_core.train.jobs import METRICS_FILE, RECIPE_FILE, RunManifest


def recipe(**changes: Any) -> Recipe:
    """A tiny recipe with dotted changes."""
    base = Recipe(
        name="base",
        output=Path("runs/base"),
        shards=Path("shards"),
        model=ModelSettings(
            vision=VisionSettings(shape=VisionShape(width=32, layers=2, heads=2), frame_px=42),
            llm=LLMSettings(shape=LLMShape(width=32, layers=2, heads=2, kv_heads=1, mlp_width=64, context=256)),
        ),
        data=DataSettings(mixture=[SourceShare(source="gaze_cell", share=1.0)]),
        loss=LossSettings(),
        run=RunSettings(steps=10, batch_samples=8, eval_every=5, wandb="disabled"),
    )
    return base.with_changes(changes)


def finished(folder: Path, loss: float, *, changes: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A run that ended with `loss`."""
    folder.mkdir(parents=True)
    recipe(**(changes or {})).to_yaml(folder / RECIPE_FILE)
    (folder / METRICS_FILE).write_text(f"step,val_loss,frames_per_s\n5,{loss + 1},40\n8,{loss + 0.5},10\n10,{loss},20\n")
    values = {
        "steps": 10,
        "model_step": 10,
        "final_loss": loss,
        "losses": {"coarse": loss + 0.2, "fine1": loss + 0.1, "fine2": loss},
        "best_step": 10,
        "best_loss": loss,
        "samples_seen": 80,
        "frames_seen": 240,
        "label_tokens_seen": 400,
        "flops": 1e9,
        "params": 1000,
        "seconds": 3.0,
        "inputs": {"shards": "a" * 64},
    }
    RunManifest(
        name=f"train-{folder.name}",
        settings_hash=folder.name,
        files=file_entries(folder, ["*.yaml"]),
        **(values | fields),
    ).write(folder)
    return folder
