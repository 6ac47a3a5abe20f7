"""Settings of the stand-in vision encoder's training (see `fvlm_core.train.vision`); light to import."""

from pathlib import Path

from fvlm_core.config import OptimizerSettings, Positive, VisionShape
from fvlm_core.settings import Settings


class VisionJob(Settings):
    """How the stand-in is trained."""

    output: Path
    shape: VisionShape
    """Its patches must be as large as a cell of the rendered grid (14 px)."""
    steps: Positive = 600
    batch_frames: Positive = 96
    optimizer: OptimizerSettings = OptimizerSettings(lr_vision=2e-3, warmup_steps=40)
    seed: int = 0
    threads: Positive = 1
