"""Settings of `python -m fvlm_core.eval job.yaml`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fvlm_core.config import Positive
from fvlm_core.eval.results import Mode
from fvlm_core.settings import EXECUTION, Settings

Count = Annotated[int, Field(ge=0)]


class EvalSettings(Settings):
    """What a model is evaluated on."""

    modes: list[Mode] | None = None
    """Modes to evaluate; None is every mode the model has."""
    loss_samples: Positive = 256
    """Samples of the validation loss, over all sources of the validation split."""
    caption_samples: Count = 64
    """Clips to caption; 0 leaves captions out."""
    mcq_samples: Count = 128
    """Multiple-choice questions; 0 leaves them out."""
    order_samples: Count = 96
    """Questions of the question-order table; 0 leaves it out."""
    heatmaps: Count = 4
    """Clips to draw; 0 leaves pictures out."""
    latency_clips: Count = 8
    """Clips timed in every mode; 0 leaves latency out."""
    max_new_tokens: Positive = 48
    """Longest generated caption, in tokens."""
    resamples: Positive = 1000
    """Bootstrap resamples of every interval."""
    batch_samples: Positive = 64
    """Sequences in a packed batch (an option of a question is one sequence)."""
    seed: int = 0
    threads: Annotated[Count, EXECUTION] = 1
    """torch CPU threads; 0 leaves torch's default."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


class EvalJob(EvalSettings):
    """One evaluation of one trained run on the fixed validation split."""

    output: Path
    """Folder of the report: `results.json`, `latency.json`, `tables.md`, pictures, `manifest.json`."""
    run: Path
    """Folder of a finished training run; its `model/` is evaluated."""
    shards: Path
    """Folder of a ShardManifest."""
