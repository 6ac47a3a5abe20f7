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
    "autotune": "run.autotune",
    "workers": "data.workers",
    "gradient_checkpointing": "run.gradient_checkpointing",
}
"""What a sweep may turn, in the order it is tuned, and the recipe's path of each. None of it changes the samples of a step."""


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
    """Step of the kept checkpoint with the lowest score (the recipe's `best`); 0 where there is none."""
    best_loss: float | None
    """Its score; by default its validation loss of the last pass. None where there is none: a sign of divergence, such as low entropy, was
    pending at each of them."""
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
    autotune: list[bool] | None = None
    """Default: on and off on a GPU, off on a CPU."""
    workers: list[Annotated[int, Field(ge=0)]] | None = None
    """Default: 0 (a thread reads ahead), and on a GPU 4."""
    gradient_checkpointing: list[bool] | None = None
    """Default: off; what does not fit into a GPU's memory is tried with it."""


class SpeedSettings(Settings):
    """What is tried to make training faster."""

    sweep: Sweep = Sweep()
    warmup_steps: Positive = 2
    """Steps of each variant before it is measured."""
    steps: Positive = 20
    """Steps of naive and of tuned that are measured in turn at the end; medians are reported."""
    sweep_steps: Positive = 6
    """The same of a setting that is tried and the best so far; with fewer than 6 no gain can be shown."""
    max_variant_s: Annotated[float, Field(gt=0)] = 30.0
    """A variant's measuring stops after this time, with at least 6 steps."""
    min_gain: Annotated[float, Field(ge=0)] = 0.02
    """A setting replaces the best so far when the lower end of its gain is above this share."""
    most_batches: Positive = 16
    """On a GPU the largest micro-batch that fits is searched up to so many times the recipe's."""
    hours_to_failure: Annotated[float, Field(gt=0)] = 24.0
    """Mean time between losses of a machine, for the interval of checkpoints that is advised."""


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
    step_s_low: float | None = None
    """Lower quartile."""
    step_s_high: float | None = None
    """Upper quartile."""
    over: str = ""
    """The variant that it was measured in turn with."""
    gain: float | None = None
    """Times as fast as that one: median over pairs of steps, with its 95 % interval."""
    gain_low: float | None = None
    gain_high: float | None = None
    pairs: int = 0
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
    power_w: float | None = None
    """GPU's power, clock and temperature at the end of its steps, by NVML: what a slow variant may owe to the machine."""
    sm_clock_mhz: int | None = None
    temperature_c: int | None = None
    peak_memory_gb: float | None = None
    data_wait_share: float | None = None
    load_average: float = 0.0
    """Of the machine, when the variant was measured."""
    failure: str = ""


class CheckpointAdvice(Settings):
    """How often to write checkpoints (Young 1974, Daly 2006), from this machine's step and disk; `run.checkpoint_every` is yours to set,
    because it decides which checkpoints can be the best."""

    bytes: int
    """Of a checkpoint: weights and AdamW's state."""
    bytes_per_s: float
    """Written to the output's disk and waited for."""
    write_s: float
    hours_to_failure: float
    steps: int
    """Between checkpoints."""


class SpeedReport(Manifest):
    """`chosen.yaml`; and, as timings no part of its identity, `speed.csv`, `speed.png`, operations and traces of naive and tuned."""

    figures: ClassVar[tuple[Figure, ...]] = (Figure(file=PLOT_FILE, caption="Training samples per second of every variant."),)
    device: str
    rows: list[SpeedRow]
    """`naive` first, `tuned` last: measured in turn."""
    naive_samples_per_s: float | None
    """None where the padded step does not fit into memory."""
    tuned_samples_per_s: float
    speedup: float | None
    """Median over pairs of steps, with its 95 % interval."""
    speedup_low: float | None
    speedup_high: float | None
    pairs: int
    target: float = 2.0
    """What was to be reached."""
    bound: str
    """What a faster step would have to shorten."""
    parts: dict[str, dict[str, float]]
    """Share of a step's time by part, for naive and tuned."""
    largest_micro_batch: MicroBatch | None = None
    """On a GPU, where it was searched: the largest that fits."""
    checkpoint: CheckpointAdvice
    chosen: dict[str, Any]
    """Recipe paths and values to train with, e.g. `{"run.threads": 2}`; the samples of a step stay the same."""

    def summary(self) -> str:
        """The result in words: a gain within the spread is none."""
        if self.speedup is None or self.speedup_low is None:
            return f"The padded step does not fit on {self.device}, the tuned one does: {self.tuned_samples_per_s:.1f} samples/s."
        high = "" if self.speedup_high is None else f"{self.speedup_high:.2f}"
        interval = f"[{self.speedup_low:.2f}, {high}], n={self.pairs} pairs of steps"
        if self.speedup_low <= 1.0:
            return f"No gain beyond the spread on {self.device}: {self.speedup:.2f}x {interval}. {self.bound}."
        met = "met" if self.speedup_low >= self.target else "not shown" if self.speedup >= self.target else "not met"
        said = f"**{self.speedup:.2f}x** {interval} as fast as naive on {self.device}"
        return f"{said}; the target of {self.target:.0f}x is {met}: {self.bound}."


class VisionTrainingSettings(Settings):
    """How the stand-in for DINOv2 is trained (see `fvlm_core.train.vision`)."""

    steps: Positive = 600
    """Optimizer steps."""
    batch_frames: Positive = 96
    """Rendered frames of a step."""
    optimizer: OptimizerSettings = OptimizerSettings(lr_vision=2e-3, warmup_steps=40)
    copies: Annotated[int, Field(ge=0)] = 0
    """Distorted copies of each training digit that are drawn too."""
    colours: Annotated[int, Field(ge=6, le=9)] | None = None
    """Patches predict the colour of their digit as well, one of so many; None asks for none."""
    crosses: bool = False
    """Each frame has the cross of the task `hunt`, which is an eleventh digit to predict; patches also predict which cell it is in."""
    seed: int = 0
    """Of the weights and the rendered frames."""
    threads: Positive = 1
    """Torch CPU threads."""


class VisionJob(VisionTrainingSettings):
    """Train an encoder of a shape."""

    output: Path
    shape: VisionShape
    """Its patches must be as large as a cell of the rendered grid (14 px)."""
