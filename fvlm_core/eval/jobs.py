"""Settings of the evaluation of a run (every part's own, `parts/`, and what they share), and of benchmarks on any checkpoint."""

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
    """What a model is evaluated on."""

    modes: list[Mode] | None = None
    """Modes to evaluate; None is every mode the model has."""
    resamples: Positive = 1000
    """Bootstrap resamples of every interval."""
    seed: int = 0
    """Of everything that is drawn: bootstrap resamples, distractors of questions, random queries."""
    batch_samples: Annotated[Positive, EXECUTION] = 64
    """Sequences in a packed batch (an option of a question is one sequence). Another number of them sums in another order, which can
    change the sixth decimal of a result, and an answer only where two are equally likely to that precision."""
    threads: Annotated[Count, EXECUTION] = 1
    """torch CPU threads; 0 leaves torch's default. Latency, which depends on it, is no part of the evaluation's identity."""
    device: Annotated[Literal["auto", "cpu", "cuda"], EXECUTION] = "auto"
    """auto: a GPU where there is one."""

    def outside(self) -> dict[tuple[str, str], Path]:
        """Files and folders from outside that the evaluation reads, by part and setting: to be there before anything starts, and part of
        its identity."""
        return {(name, file): path for name, part in self.parts().items() for file, path in part.outside().items()}


class EvalJob(EvalSettings):
    """One evaluation of one trained run on the fixed validation split."""

    output: Path
    """Folder of the report: `results.json`, `timings.json`, `tables.md`, pictures, `manifest.json`."""
    run: Path
    """Folder of a finished training run; its `model/` is evaluated."""
    shards: Path
    """Folder of a ShardManifest."""


class Original(Settings):
    """What a checkpoint of the original does not say about itself."""

    vision: str | None = None
    """Hub name or folder of the DINOv2 it was built with."""
    llm: str | None = None
    """Of the SmolLM2."""
    frame_px: int | None = None
    """Side of its frames; None: 224 px."""


class CheckpointJob(Settings):
    """Benchmarks on any checkpoint (`fvlm_core.serve.evaluate`)."""

    output: Path
    """Gets `results.json`, `timings.json`, `tables.md`, a picture and `items/`."""
    checkpoint: Path
    """A run or model folder of ours, a checkpoint of the original, a SmolVLM2 folder."""
    original: Original = Original()
    benchmarks: Benchmarks
    latency: Annotated[Latency, EXECUTION] = Latency(clips=4)
    """Clips of the benchmarks' that answers are timed on, in every mode."""
    resamples: int = 1000
    seed: int = 0
    batch_samples: Annotated[int, EXECUTION] = 64
    threads: Annotated[int, EXECUTION] = 0
    device: Annotated[Literal["auto", "cpu", "cuda"], EXECUTION] = "auto"
