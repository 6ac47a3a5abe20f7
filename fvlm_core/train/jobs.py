"""Settings and manifests of the training jobs: runs, speed measurements and the small stand-in vision encoder.

Does not import torch, because flows, launchers and reports use it too.
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
    "autotune": "run.autotune",
    "workers": "data.workers",
    "gradient_checkpointing": "run.gradient_checkpointing",
}
"""Settings that a sweep tunes, in order, and their recipe paths. None of them changes the samples of a step."""


class Divergence(Settings):
    """A divergence of training, and the response to it."""

    step: int
    """Optimizer steps done when it was detected."""
    reason: str
    back_to: int
    """Step of the checkpoint that training rolled back to; 0 is the start."""
    froze: str
    """What was frozen after it: `vision`, then `llm_lower` (the lower half of the language model's layers). Empty if it ended the run
    (`run.on_divergence`)."""


class OutOfMemory(Settings):
    """An out-of-memory error of a micro-batch, after which training continued with smaller ones."""

    step: int
    """Optimizer steps done when it happened."""
    micro_batch: MicroBatch
    """The micro-batch budget from then on, half of the previous one."""


class RunManifest(Manifest):
    """Manifest of a finished training run."""

    steps: int
    final_loss: float
    """Validation loss of the last pass, for the model in `model/`."""
    model_step: int
    """Step of the model in `model/`: `best_step`, or the last step if the recipe's `best.use` says so."""
    losses: dict[str, float]
    """Its validation losses, by pass with a non-zero weight: cross-entropy per labelled token, or the DPO loss per pair."""
    best_step: int
    """Step of the kept checkpoint with the lowest score (the recipe's `best`); 0 if no checkpoint has a score."""
    best_loss: float | None
    """Score of that checkpoint; by default, its validation loss of the last pass. None if no checkpoint has a score, because a sign of
    divergence, such as low entropy, was pending at each of them."""
    samples_seen: int
    frames_seen: int
    """Number of shown frames."""
    label_tokens_seen: int
    flops: float
    """FLOPs of all training steps, computed from the configuration."""
    params: int
    validation_share: float = 0.0
    """Share of the time in training steps and validation that validation took."""
    resumed_from: list[int] = Field(default_factory=list)
    """Steps of the checkpoints that the run was resumed from."""
    skipped_steps: int = 0
    """Number of steps without an update, because the loss or the gradient norm was not finite."""
    divergences: list[Divergence] = Field(default_factory=list)
    out_of_memory: list[OutOfMemory] = Field(default_factory=list)


class Sweep(Settings):
    """Values to try for each setting. Omitted settings get default values for the device."""

    micro_batch: list[MicroBatch] | None = None
    """Micro-batch budgets. Default: the recipe's, twice, half and a quarter of it."""
    threads: list[Annotated[int, Field(ge=0)]] | None = None
    """Numbers of CPU threads. Default: 1 on a GPU; 1 and all cores on a CPU."""
    precision: list[Literal["fp32", "bf16"]] | None = None
    """Precisions. Default: bf16 on a GPU, fp32 on a CPU."""
    compile: list[bool | list[CompiledPart]] | None = None
    """Lists of parts to compile; true is all. Default: all and none on a GPU; none on a CPU, where compiling costs more than it saves."""
    autotune: list[bool] | None = None
    """Whether to autotune matrix products. Default: on and off on a GPU, off on a CPU."""
    workers: list[Annotated[int, Field(ge=0)]] | None = None
    """Numbers of data loader processes. Default: 0 (a thread prefetches), on a GPU also 4."""
    gradient_checkpointing: list[bool] | None = None
    """Whether to use gradient checkpointing. Default: off, or on if the recipe's own step does not fit into GPU memory."""


class SpeedSettings(Settings):
    """Which settings to try to make training faster, and how to measure them."""

    sweep: Sweep = Sweep()
    warmup_steps: Positive = 2
    """Number of warm-up steps of each variant."""
    steps: Positive = 20
    """Number of measured steps of the naive and the tuned variant, interleaved; medians are reported."""
    sweep_steps: Positive = 6
    """Number of measured steps of a candidate setting and of the best so far, interleaved. Fewer than 6 cannot show a gain."""
    max_variant_s: Annotated[float, Field(gt=0)] = 30.0
    """The measurement of a variant stops after this time in seconds, but not before 6 steps."""
    min_gain: Annotated[float, Field(ge=0)] = 0.02
    """A setting replaces the best so far if the lower bound of its relative gain exceeds this."""
    most_batches: Positive = 16
    """On a GPU, the largest micro-batch that fits is searched up to this multiple of the recipe's."""
    hours_to_failure: Annotated[float, Field(gt=0)] = 24.0
    """Mean time between failures of a machine in hours, for the recommended checkpoint interval."""


class SpeedJob(SpeedSettings):
    """Measures the training speed of a recipe in a naive implementation and with tuned settings."""

    output: Path
    recipe: Recipe
    """The recipe to measure. Nothing is written to its output folder."""


class SpeedRow(Settings):
    """Measurements of one variant."""

    variant: str
    settings: dict[str, Any]
    """Changed settings: recipe paths to values."""
    steps: int
    """Number of measured steps; 0 if it failed."""
    step_s: float | None = None
    """Median seconds per step."""
    step_s_low: float | None = None
    """Lower quartile of seconds per step."""
    step_s_high: float | None = None
    """Upper quartile of seconds per step."""
    over: str = ""
    """The variant that its steps were interleaved with."""
    gain: float | None = None
    """Speed relative to that variant: median over pairs of steps; `gain_low` and `gain_high` are its 95 % confidence interval."""
    gain_low: float | None = None
    gain_high: float | None = None
    pairs: int = 0
    samples_per_s: float | None = None
    frames_per_s: float | None = None
    tokens_per_s: float | None = None
    gflops_per_s: float | None = None
    """Training GFLOP (from the configuration) per second."""
    share_of_matmul: float | None = None
    """FLOP/s as a share of those of a large `torch.mm` with the same threads or GPU and the same precision."""
    mfu: float | None = None
    """Model FLOPs utilisation: FLOP/s as a share of the GPU's data-sheet peak."""
    gpu_busy: float | None = None
    """Share of time in which a kernel runs."""
    power_w: float | None = None
    """GPU power at the end of the steps. Power, clock and temperature (from NVML) show whether the machine slowed a variant down."""
    sm_clock_mhz: int | None = None
    temperature_c: int | None = None
    peak_memory_gb: float | None = None
    data_wait_share: float | None = None
    load_average: float = 0.0
    """Load average of the machine when the variant was measured."""
    failure: str = ""


class CheckpointAdvice(Settings):
    """Recommended checkpoint interval (Young 1974, Daly 2006) for this machine's step time and disk speed.

    It is not applied: `run.checkpoint_every` also determines which checkpoints can be the best, so the user has to set it.
    """

    bytes: int
    """Size of a checkpoint: weights and AdamW state."""
    bytes_per_s: float
    """Measured write speed of the output's disk, including fsync."""
    write_s: float
    """Estimated seconds to write a checkpoint."""
    hours_to_failure: float
    steps: int
    """Recommended number of steps between checkpoints."""


class SpeedReport(Manifest):
    """Manifest of a speed job: `chosen.yaml`, `speed.csv`, `speed.png`, and operation tables and traces of naive and tuned.

    Only `chosen.yaml` is part of its identity; the others contain timings.
    """

    figures: ClassVar[tuple[Figure, ...]] = (Figure(file=PLOT_FILE, caption="Training samples per second of every variant."),)
    device: str
    rows: list[SpeedRow]
    """All variants: `naive` first and `tuned` last, whose steps were interleaved."""
    naive_samples_per_s: float | None
    """None if the padded step does not fit into memory."""
    tuned_samples_per_s: float
    speedup: float | None
    """Speed of tuned relative to naive: median over pairs of steps; `speedup_low` and `speedup_high` are its 95 % confidence interval."""
    speedup_low: float | None
    speedup_high: float | None
    pairs: int
    target: float = 2.0
    """Target speedup."""
    bound: str
    """What limits the speed of a tuned step."""
    parts: dict[str, dict[str, float]]
    """Share of step time by part, for naive and tuned."""
    largest_micro_batch: MicroBatch | None = None
    """The largest micro-batch that fits, if it was searched (on a GPU)."""
    checkpoint: CheckpointAdvice
    chosen: dict[str, Any]
    """Recipe paths and values to train with, e.g. `{"run.threads": 2}`. They do not change the samples of a step."""

    def summary(self) -> str:
        """Summarise the result in words. A gain whose confidence interval includes 1 is reported as none."""
        if self.speedup is None or self.speedup_low is None:
            return f"The padded step does not fit on {self.device}, the tuned one does: {self.tuned_samples_per_s:.1f} samples/s."
        high = "" if self.speedup_high is None else f"{self.speedup_high:.2f}"
        interval = f"[{self.speedup_low:.2f}, {high}], n={self.pairs} pairs of steps"
        if self.speedup_low <= 1.0:
            return f"No significant gain on {self.device}: {self.speedup:.2f}x {interval}. {self.bound}."
        met = "met" if self.speedup_low >= self.target else "not shown" if self.speedup >= self.target else "not met"
        said = f"**{self.speedup:.2f}x** {interval} as fast as naive on {self.device}"
        return f"{said}; the target of {self.target:.0f}x is {met}: {self.bound}."


class VisionTrainingSettings(Settings):
    """Training of the small stand-in for DINOv2 (see `fvlm_core.train.vision`)."""

    steps: Positive = 600
    """Number of optimizer steps."""
    batch_frames: Positive = 96
    """Number of rendered frames per step."""
    optimizer: OptimizerSettings = OptimizerSettings(lr_vision=2e-3, warmup_steps=40)
    copies: Annotated[int, Field(ge=0)] = 0
    """Number of distorted copies of each training digit to draw in addition to the original."""
    colours: Annotated[int, Field(ge=6, le=9)] | None = None
    """Number of digit colours, which patches then predict too. Null: patches do not predict a colour."""
    crosses: bool = False
    """Whether each frame has the cross of the task `hunt`. It is an eleventh class of digit, and patches also predict its cell."""
    seed: int = 0
    """Seed of the weights and the rendered frames."""
    threads: Positive = 1
    """Number of torch CPU threads."""


class VisionJob(VisionTrainingSettings):
    """Trains an encoder of the given shape."""

    output: Path
    shape: VisionShape
    """Shape of the encoder. Its patches must be as large as a cell of the rendered grid (14 px)."""
