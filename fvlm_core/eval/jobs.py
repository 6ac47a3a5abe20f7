"""Settings of the evaluation of a training run (shared ones; those of each part are in `parts/`), and of benchmarks on any checkpoint."""

from pathlib import Path
from typing import Annotated, Literal

from fvlm_core.config import Positive
from fvlm_core.eval.part import Count
from fvlm_core.eval.parts import Parts
from fvlm_core.eval.parts.benchmarks import Benchmarks
from fvlm_core.eval.parts.latency import Latency
from fvlm_core.model.names import Mode
from fvlm_core.settings import EXECUTION, Settings


class EvalSettings(Parts):
    """Settings of an evaluation."""

    modes: list[Mode] | None = None
    """Modes to evaluate; None evaluates all modes of the model."""
    resamples: Positive = 1000
    """Number of bootstrap resamples for each confidence interval."""
    seed: int = 0
    """Random seed for bootstrap resamples, distractors of questions, random queries and sample selection."""
    batch_samples: Annotated[Positive, EXECUTION] = 64
    """Sequences in a packed batch (each option of a question is one sequence). The value changes the order of floating-point sums, which
    can change the sixth decimal of a result, and an answer only if two are equally likely to that precision."""
    threads: Annotated[Count, EXECUTION] = 1
    """torch CPU threads; 0 keeps torch's default. Only latency depends on this, which is not part of the evaluation's identity."""
    device: Annotated[Literal["auto", "cpu", "cuda"], EXECUTION] = "auto"
    """auto: a GPU if available, else the CPU."""

    def outside(self) -> dict[tuple[str, str], Path]:
        """External files and folders that the evaluation reads, by part and setting. They must exist before it starts, and their digests
        are part of its identity."""
        return {(name, file): path for name, part in self.parts().items() for file, path in part.outside().items()}


class EvalJob(EvalSettings):
    """An evaluation of a training run on the fixed validation split."""

    output: Path
    """Output folder: `results.json`, `timings.json`, `tables.md`, figures, `manifest.json`."""
    run: Path
    """Folder of a finished training run; its `model/` is evaluated."""
    shards: Path
    """Folder of the shards, with their `manifest.json`."""


class Original(Settings):
    """Properties that a checkpoint of the original fVLM does not store."""

    vision: str | None = None
    """Hub name or folder of its DINOv2."""
    llm: str | None = None
    """Hub name or folder of its SmolLM2."""
    frame_px: int | None = None
    """Side of its frames in pixels; None is 224."""


class CheckpointJob(Settings):
    """Benchmarks on any checkpoint (`fvlm_core.serve.evaluate`)."""

    output: Path
    """Output folder: `results.json`, `timings.json`, `tables.md`, a figure and `items/`."""
    checkpoint: Path
    """A run or model folder of this package, a checkpoint of the original fVLM, or a SmolVLM2 folder."""
    original: Original = Original()
    benchmarks: Benchmarks
    latency: Annotated[Latency, EXECUTION] = Latency(clips=4)
    """Latency measurement, on clips of the benchmarks."""
    resamples: int = 1000
    seed: int = 0
    batch_samples: Annotated[int, EXECUTION] = 64
    threads: Annotated[int, EXECUTION] = 0
    device: Annotated[Literal["auto", "cpu", "cuda"], EXECUTION] = "auto"
