"""Settings and manifests of the training jobs: a run, the speed measurement, the stand-in vision encoder.

No torch here: flows, launchers and reports read them too.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from fvlm_core.config import CompiledPart, MicroBatch, OptimizerSettings, Positive, Recipe, VisionShape
from fvlm_core.figures import Figure
from fvlm_core.manifest import Manifest
from fvlm_core.settings import Settings

IDENTITY_FILE = "identity.yaml"
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.csv"
MODEL_FOLDER = "model"
CHECKPOINTS_FOLDER = "checkpoints"
REFERENCE_FOLDER = "reference"

TABLE_FILE, PLOT_FILE, CHOSEN_FILE = "speed.csv", "speed.png", "chosen.yaml"
SWEPT = {
    "micro_batch": "run.micro_batch",
    "threads": "run.threads",
    "precision": "run.precision",
    "compile": "run.compile",
    "workers": "data.workers",
    "gradient_checkpointing": "run.gradient_checkpointing",
}
"""What a sweep may turn, in the order it is tuned, and the recipe's path of each. None of it changes the samples of a step."""
NAIVE: dict[str, Any] = {
    "run.micro_batch": {"frames": 1, "tokens": 1},  # a sample at a time
    "run.threads": 0,
    "run.precision": "fp32",
    "run.compile": False,
    "data.workers": 0,
    "run.gradient_checkpointing": False,
}
"""What a plain first implementation does."""


class Divergence(Settings):
    """One time that training diverged, and what was done."""

    step: int
    """Optimizer steps done when it was noticed."""
    reason: str
    back_to: int
    """Step of the checkpoint that training went back to; 0 is the start."""
    froze: str
    """What is frozen from then on: `vision`, then `llm_lower` (the lower half of the language model's layers); empty where the run
    ended by it (`run.on_divergence`)."""


class OutOfMemory(Settings):
    """One time that a micro-batch did not fit into the GPU's memory; smaller ones were computed from then on."""

    step: int
    """Optimizer steps done when it was noticed."""
    micro_batch: MicroBatch
    """The budget from then on, half of the one before."""


class RunManifest(Manifest):
    """A finished training run."""

    steps: int
    final_loss: float
    """Validation loss of the last pass, of the model in `model/`."""
    model_step: int
    """Step that the model in `model/` is of: `best_step`, or the last one where the recipe's `best.use` says so."""
    losses: dict[str, float]
    """Its validation loss of each pass that has a weight: cross-entropy per labelled token, or the DPO loss per pair."""
    best_step: int
    """Step of the kept checkpoint with the lowest score (the recipe's `best`)."""
    best_loss: float
    """Its score; by default its validation loss of the last pass."""
    samples_seen: int
    frames_seen: int
    """Shown frames."""
    label_tokens_seen: int
    flops: float
    """Of all training steps, from the configuration."""
    params: int
    validation_share: float = 0.0
    """Of the time in training steps and validation, what validation took."""
    resumed_from: list[int] = Field(default_factory=list)
    """The steps of the checkpoints that the run was continued from."""
    skipped_steps: int = 0
    """Steps without an update because the loss or a gradient was not finite."""
    divergences: list[Divergence] = Field(default_factory=list)
    out_of_memory: list[OutOfMemory] = Field(default_factory=list)


class Sweep(Settings):
    """The values to try of each setting; left out, they are chosen for the device."""

    micro_batch: list[MicroBatch] | None = None
    """Default: the recipe's, its double, its half and its quarter."""
    threads: list[Annotated[int, Field(ge=0)]] | None = None
    """Default: 1, and on a CPU all cores."""
    precision: list[Literal["fp32", "bf16"]] | None = None
    """Default: bf16 on a GPU, fp32 on a CPU."""
    compile: list[bool | list[CompiledPart]] | None = None
    """Parts to compile, or all (true). Default: all and none on a GPU, off on a CPU, where compiling takes longer than it saves."""
    workers: list[Annotated[int, Field(ge=0)]] | None = None
    """Default: 0 (a thread reads ahead), and on a GPU 4."""
    gradient_checkpointing: list[bool] | None = None
    """Default: off; what does not fit into a GPU's memory is tried with it."""


class SpeedSettings(Settings):
    """What is tried to make training faster."""

    sweep: Sweep = Sweep()
    warmup_steps: Positive = 2
    steps: Positive = 6
    """Measured steps per variant; medians are reported."""
    max_variant_s: Annotated[float, Field(gt=0)] = 30.0
    """A variant's measuring stops after this time, with at least two steps."""
    min_gain: Annotated[float, Field(ge=0)] = 0.03
    """A setting replaces the best so far when it is faster by this share; below it, timings are noise."""


class SpeedJob(SpeedSettings):
    """How fast the recipe trains as a plain implementation would run it, and tuned."""

    output: Path
    recipe: Recipe
    """What to measure; its output folder is not touched."""


class SpeedRow(Settings):
    """One variant, measured."""

    variant: str
    settings: dict[str, Any]
    """Recipe paths and values."""
    steps: int
    """Steps measured; 0 where it failed."""
    step_s: float | None = None
    """Median."""
    samples_per_s: float | None = None
    frames_per_s: float | None = None
    tokens_per_s: float | None = None
    gflops_per_s: float | None = None
    """Training GFLOP (from the configuration) per second."""
    share_of_matmul: float | None = None
    """Of a plain large torch.mm's GFLOP/s on the same threads or GPU, in fp32 or bf16 as the variant."""
    mfu: float | None = None
    """Of the GPU's data-sheet peak."""
    gpu_busy: float | None = None
    """Share of the time that a kernel runs."""
    peak_memory_gb: float | None = None
    data_wait_share: float | None = None
    load_average: float = 0.0
    """Of the machine, when the variant was measured."""
    failure: str = ""


class SpeedReport(Manifest):
    """`speed.csv`, `speed.png` (timings: not part of its identity) and `chosen.yaml`."""

    figures: ClassVar[tuple[Figure, ...]] = (Figure(file=PLOT_FILE, caption="Training samples per second of every variant."),)
    device: str
    rows: list[SpeedRow]
    """`naive` first, `tuned` last: both measured once more, side by side."""
    naive_samples_per_s: float
    tuned_samples_per_s: float
    speedup: float
    chosen: dict[str, Any]
    """Recipe paths and values to train with, e.g. `{"run.threads": 2}`; the samples of a step stay the same."""


class VisionTrainingSettings(Settings):
    """How the stand-in for DINOv2 is trained (see `fvlm_core.train.vision`)."""

    steps: Positive = 600
    batch_frames: Positive = 96
    optimizer: OptimizerSettings = OptimizerSettings(lr_vision=2e-3, warmup_steps=40)
    seed: int = 0
    threads: Positive = 1


class VisionJob(VisionTrainingSettings):
    """Train an encoder of a shape."""

    output: Path
    shape: VisionShape
    """Its patches must be as large as a cell of the rendered grid (14 px)."""
