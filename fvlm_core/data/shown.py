"""Which frames of a video a model was trained with: written beside its weights, so that it is shown the same wherever it is used."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from fvlm_core.config import Positive
from fvlm_core.data.frames import FrameRule
from fvlm_core.data.jobs import ShardManifest
from fvlm_core.settings import Settings

SHOWN_FILE = "frames.yaml"
"""In a run's folder of the model."""


class ShownFrames(Settings):
    """What `frames.yaml` holds."""

    frame_px: Positive
    fps: Annotated[float, Field(gt=0)] = FrameRule.fps
    max_frames: Positive = FrameRule.max_frames
    image_repeats: Positive = 8
    """How often an image is shown (8 is the original's number)."""

    @classmethod
    def of_training(cls, shards: ShardManifest, image_repeats: int) -> "ShownFrames":
        """As a run sees the shards."""
        return cls(
            frame_px=shards.frame_px,
            fps=shards.fps,
            max_frames=shards.max_frames,
            image_repeats=image_repeats,
        )

    @classmethod
    def of_model(cls, folder: Path, frame_px: int) -> "ShownFrames":
        """As the model in the folder was trained; the defaults for one that was not trained here. Raises UserError for a damaged file."""
        return cls.from_yaml(folder / SHOWN_FILE) if (folder / SHOWN_FILE).is_file() else cls(frame_px=frame_px)

    @property
    def rule(self) -> FrameRule:
        """Which frames are taken out of a video."""
        return FrameRule(self.frame_px, self.fps, self.max_frames)
