"""Which frames of a video a model was trained on. Written beside its weights, so that it gets the same frames wherever it is used."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from fvlm_core.config import Positive
from fvlm_core.data.frames import FrameRule
from fvlm_core.data.jobs import ShardManifest
from fvlm_core.settings import Settings

FRAME_SAMPLING_FILE = "frames.yaml"
"""File name in the folder of the model."""


class FrameSampling(Settings):
    """Content of `frames.yaml`."""

    frame_px: Positive
    fps: Annotated[float, Field(gt=0)] = FrameRule.fps
    max_frames: Positive = FrameRule.max_frames
    image_repeats: Positive = 8
    """How often an image is shown (8 in the original fVLM)."""

    @classmethod
    def of_training(cls, shards: ShardManifest, image_repeats: int) -> "FrameSampling":
        """Return the frames that a run on these shards sees."""
        return cls(
            frame_px=shards.frame_px,
            fps=shards.fps,
            max_frames=shards.max_frames,
            image_repeats=image_repeats,
        )

    @classmethod
    def of_model(cls, folder: Path, frame_px: int) -> "FrameSampling":
        """Return the frame sampling that the model in `folder` was trained with; the defaults if it has no `frames.yaml`.

        Raises UserError if the file is damaged.
        """
        return cls.from_yaml(folder / FRAME_SAMPLING_FILE) if (folder / FRAME_SAMPLING_FILE).is_file() else cls(frame_px=frame_px)

    @property
    def rule(self) -> FrameRule:
        """Which frames are taken from a video."""
        return FrameRule(self.frame_px, self.fps, self.max_frames)
