"""The typed recipe tree: one YAML file is one training run.

`Recipe` is what `torchrun -m fvlm_core.train recipe.yaml` reads. Every part is documented where it is defined, closed to
unknown keys, and reusable: a phase of the pipeline combines the same parts. Paths (shards, checkpoints, output) are left
out of `Recipe.identity`, so a run keeps its identity when the volume moves.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from fvlm_core.settings import EXECUTION, NameOrFolder, Settings, hash_json

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Zoom = Annotated[int, Field(ge=2, le=16)]


class VisionShape(Settings):
    """A DINOv2 built from configuration, with random weights."""

    width: Positive = 384
    """Size of a patch's hidden state."""
    layers: Positive = 12
    """Transformer layers."""
    heads: Positive = 6
    """Attention heads; they divide the width."""
    patch_px: Positive = 14
    """Side of a patch."""
    layerscale: float = 1.0
    """Initial layer scale; 1.0 as in transformers' configuration."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} do not divide width {self.width}")
        return self


class LLMShape(Settings):
    """A Llama built from configuration, with random weights; the vocabulary comes from the tokenizer."""

    width: Positive = 576
    """Size of a token's hidden state."""
    layers: Positive = 30
    """Transformer layers."""
    heads: Positive = 9
    """Attention heads; they divide the width into even parts."""
    kv_heads: Positive = 3
    """Heads of keys and values, each shared by equally many of the attention heads."""
    mlp_width: Positive = 1536
    """Inner width of the feed-forward layers."""
    context: Positive = 8192
    """Longest sequence, in tokens."""
    rope_theta: float = 100_000.0
    """Base of the rotary position embeddings' frequencies."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(f"heads {self.heads} do not cut width {self.width} into even parts, which rotary embeddings need")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} do not divide heads {self.heads}")
        return self


class VisionSettings(Settings):
    """The vision encoder: a checkpoint, or a shape with random weights; never silently the latter."""

    checkpoint: NameOrFolder | None = None
    """Hub name or local folder of a DINOv2, e.g. `facebook/dinov2-small`."""
    shape: VisionShape | None = None
    frame_px: Positive = 224
    """Side of the square frames it sees, a multiple of its patch."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.checkpoint is None) == (self.shape is None):
            raise ValueError("give exactly one of checkpoint and shape")
        if self.shape is not None and self.frame_px % self.shape.patch_px:
            raise ValueError(f"frame_px {self.frame_px} is not a multiple of shape.patch_px {self.shape.patch_px}")
        return self


class LLMSettings(Settings):
    """The language model: a checkpoint, or a shape with random weights; never silently the latter."""

    checkpoint: NameOrFolder | None = None
    """Hub name or local folder of a Llama, e.g. `HuggingFaceTB/SmolLM2-135M-Instruct`."""
    layers: Positive | None = None
    """Keep the checkpoint's first so many layers, a size between the published ones; None: all."""
    shape: LLMShape | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.checkpoint is None) == (self.shape is None):
            raise ValueError("give exactly one of checkpoint and shape")
        if self.layers is not None and self.shape is not None:
            raise ValueError("layers is of a checkpoint; a shape has its own")
        return self


class GlanceSettings(Settings):
    """Gaze before encode: a frame is encoded small, and the query decides which high-resolution patches are encoded at all.

    `vision.frame_px` is `px` x `zoom` ^ `levels`, or `px` times all of a list of zooms. How it works, what was measured: docs/foveation.md.
    """

    px: Positive = 112
    """Side of the glance, the small frame that is always encoded; a multiple of the patch."""
    zoom: Zoom | Annotated[list[Zoom], Field(min_length=1, max_length=6)] = 2
    """How much finer the patches under a patch are: `zoom` x `zoom` of them. A list says it for every level: fewer and larger steps to the
    same resolution are faster, because each is one more walk through the encoder."""
    levels: Annotated[int, Field(ge=1, le=6)] = 1
    """How often it is gone deeper. Above 1, the opened patches that are read most are opened too: 112 px, zoom 2, 3 levels: 896 px frames,
    of which the details under a few patches are encoded."""
    open: Positive = 4
    """Patches that a query opens at each level at inference, and in training with `train_on: chosen`."""
    train_on: Literal["all", "chosen"] = "all"
    """all: every patch is open and weighed by p, the first phase of training; chosen: each query opens its own, what inference does."""
    explore: Annotated[float, Field(ge=0)] = 1.0
    """Scale of the Gumbel noise on log p when training on chosen patches; without it choosing collapses."""
    distill: Annotated[float, Field(ge=0)] = 0.3
    """Weight, when training on chosen patches, of the cross-entropy from where a query looked to where it had expected to; a query counts
    as much as a labelled token."""

    @property
    def zooms(self) -> list[int]:
        """The zoom of every level."""
        return [self.zoom] * self.levels if isinstance(self.zoom, int) else self.zoom

    @property
    def shrink(self) -> int:
        """Sides of the frame over those of the glance."""
        return math.prod(self.zooms)

    @model_validator(mode="after")
    def _a_zoom_per_level(self) -> Self:
        if len(self.zooms) != self.levels:
            raise ValueError(f"zoom has {len(self.zooms)} values, levels is {self.levels}: one each")
        return self


class ModelSettings(Settings):
    """The foveated model and its baselines."""

    vision: VisionSettings
    llm: LLMSettings
    query: Literal["deep", "shallow", "random", "pooled"] = "deep"
    """deep: the query attends in every encoder layer; shallow: once, to the last layer; random: deep with fixed random
    queries (control); pooled: no queries, average-pooled patches (baseline)."""
    tokens_per_frame: Literal[1, 4, 9, 16] = 1
    """Visual tokens that a frame leaves: one query each."""
    fine_iterations: Annotated[int, Field(ge=0, le=8)] = 2
    """Fine passes in training after the coarse one; inference uses one. 0 with `pooled`."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the query's attention logits."""
    visual_scale: Annotated[float, Field(gt=0)] = 0.14
    """Standard deviation of visual tokens at the start; about that of the LLM's text embeddings (0.14 for SmolLM2)."""
    film_head_width: Annotated[int, Field(ge=0)] = 0
    """Width of the FiLM-conditioned prediction head (capacity ablation); 0 is none."""
    glance: GlanceSettings | None = None
    """None: every frame is encoded in full."""

    def identity_values(self) -> dict[str, Any]:
        """As of any settings; a model without a glance keeps the identity that it had before there was one."""
        values = super().identity_values()
        return values if self.glance else {name: value for name, value in values.items() if name != "glance"}

    @model_validator(mode="after")
    def _glance_fits(self) -> Self:
        if self.glance is None:
            return self
        if self.query != "deep":
            raise ValueError("glance needs query 'deep': it is the query's attention in every layer that chooses and reads patches")
        side = self.glance.px * self.glance.shrink
        if self.vision.frame_px != side:
            zooms = " x ".join(map(str, self.glance.zooms))
            raise ValueError(f"vision.frame_px {self.vision.frame_px} is not glance.px x its zooms, {self.glance.px} x {zooms} = {side}")
        if self.vision.shape is not None and self.glance.px % self.vision.shape.patch_px:
            raise ValueError(f"glance.px {self.glance.px} is not a multiple of vision.shape.patch_px {self.vision.shape.patch_px}")
        return self

    @model_validator(mode="after")
    def _passes(self) -> Self:
        if (self.query == "pooled") != (self.fine_iterations == 0):
            raise ValueError("fine_iterations is 0 with query 'pooled', and only there")
        return self

    def portable(self) -> Self:
        """The same with local checkpoint folders by name only, so that it says the same wherever they are."""
        backbones = {"vision": self.vision, "llm": self.llm}
        named = {
            role: backbone.model_copy(update={"checkpoint": Path(backbone.checkpoint).name})
            for role, backbone in backbones.items()
            if backbone.checkpoint is not None and Path(backbone.checkpoint).exists()
        }
        return self.model_copy(update=named)


class SourceShare(Settings):
    """One source of the mixture."""

    source: str
    """Name of a source in the shards."""
    share: Share
    """Share of samples or of tokens (`data.shares_of`); the shares of a mixture add up to 1."""
    max_epochs: Annotated[float, Field(gt=0)] | None = None
    """A run that would go through the source more often is refused before it starts. None: as often as the share asks for, each time
    in another order."""


def _whole(mixture: list[SourceShare]) -> list[SourceShare]:
    if abs(sum(part.share for part in mixture) - 1) > 1e-6:
        raise ValueError("the shares of the mixture must add up to 1")
    if len({part.source for part in mixture}) < len(mixture):
        raise ValueError("a source appears twice in the mixture")
    return mixture


SourceShares = Annotated[list[SourceShare], Field(min_length=1), AfterValidator(_whole)]


class ValidationSettings(Settings):
    """What the validation loss is measured on, where that is not what the run trains on."""

    mixture: SourceShares
    question_first: Share = 0.5
    """As `data.question_first`, of the validation samples."""
    loss_on: Literal["all_text", "answers"] = "answers"
    """Whose tokens the validation loss is a mean over: of all text, or of answers only."""


class StagingSettings(Settings):
    """Copies of shards on a local disk, for shards on a network volume: a shard is fetched once, in one piece, and read from there."""

    folder: Path
    """On the local disk; ranks and loader processes of one machine share it. Other files in it are left alone."""
    max_gb: Annotated[float, Field(gt=0)] = 50.0
    """GB = 1e9 bytes of copies that are kept; the least recently read go first. A shard that does not fit is read where it is."""


class DataSettings(Settings):
    """What a batch is made of."""

    mixture: SourceShares
    shares_of: Literal["samples", "tokens"] = "samples"
    """What the mixture's shares are shares of. tokens: positions of the packed sequence, text and visual, by each source's mean."""
    question_first: Share = 0.5
    """Share of question-answer samples whose question comes before the frames."""
    loss_on: Literal["all_text", "answers", "preferences"] = "answers"
    """all_text (captioning, stage 1): questions and answers; answers: answers only; preferences (with `dpo`): every sample comes
    as a pair, with the answer that was chosen and with the one that was rejected."""
    image_repeats: Positive = 8
    """An image is shown as a still video of this many frames, encoded once."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes per rank; 0 reads in the training process."""
    shuffle_shards: Positive | None = None
    """None: every epoch of a source is one shuffle of all its samples. A number: the source's shards are shuffled, and its samples within
    so many shards at a time, so that what is read within an hour stands in few files (see `staging`)."""
    staging: Annotated[StagingSettings | None, EXECUTION] = None
    """None: shards are read where they are."""

    validation: ValidationSettings | None = None
    """None: validated on what is trained on. Runs that train on different data are comparable only on a set of their own."""

    @property
    def held_out(self) -> Self:
        """What validation batches are made of: how training reads its shards does not choose them, nor how long a model's samples are."""
        if self.validation is None:
            return self.model_copy(update={"shuffle_shards": None, "shares_of": "samples"})
        return self.model_copy(update={**dict(self.validation), "validation": None, "shuffle_shards": None, "shares_of": "samples"})

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        if self.loss_on == "preferences" and self.validation is not None:
            raise ValueError("preferences are validated on preferences: leave validation out")
        return self


class LossSettings(Settings):
    """Weights of the passes' text losses (normalised to add up to 1).

    A loss on every pass trains queries made of fine hidden states too; without it autoregressive inference drifts.
    """

    coarse: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the coarse pass."""
    fine: list[Annotated[float, Field(ge=0)]] = Field(default_factory=lambda: [1.0, 1.0])
    """One weight per fine iteration; the last must be above 0."""


class DpoSettings(Settings):
    """Direct preference optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290) from the model the run starts with.

    Every pass with a loss weight has its own loss and its own reference, because each is a way to run the model.
    """

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How costly it is to leave the reference: the loss is -log sigmoid(beta * margin over the reference)."""


class BestSettings(Settings):
    """Checkpoint score, lower is better: weighted mean of the passes' validation losses plus a penalty on drift."""

    use: Literal["best", "last"] = "best"
    """Whose weights a run ends with: those of the checkpoint with the lowest score, or those of the last step."""

    passes: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Weight of each pass's loss by its name (`coarse`, `fine1`, ...), normalised to add up to 1; empty: the last pass alone."""
    drift: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the gap between the last pass and the one before it. Their queries come from hidden states of different kinds, as
    those of training and of autoregressive inference do; a model for which that matters drifts over a long video."""


class OptimizerSettings(Settings):
    """AdamW with a learning rate per role, and their schedule."""

    lr_connector: Annotated[float, Field(ge=0)] = 1e-3
    """Peak learning rate of queries, projections and what else is neither backbone's."""
    lr_vision: Annotated[float, Field(ge=0)] = 1e-5
    """0 freezes the vision encoder."""
    lr_llm: Annotated[float, Field(ge=0)] = 1e-5
    """0 freezes the language model."""
    backbone_scale: Annotated[float, Field(ge=0)] = 1.0
    """Multiplies both backbones' learning rates; 0 trains the connector alone."""
    schedule: Literal["cosine", "constant", "wsd", "converging"] = "cosine"
    """wsd: warm up, stay, decay over the last fifth; converging: the connector's rate falls to the backbones' own."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rates rise from 0 to their peaks."""
    warmup_share: Share = 0.0
    """In place of `warmup_steps`: warm-up as a share of the run's steps, so that runs of any length leave it."""
    final_share: Share = 0.05
    """Learning rate at the end as a share of the peak (cosine, wsd)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """On matrices only: never on norms, biases, embeddings of position, or queries."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's running mean of gradients."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """Decay of AdamW's running mean of squared gradients."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient of all parameters together; a larger one is scaled down."""

    @property
    def peaks(self) -> dict[str, float]:
        """The peak learning rate of each role."""
        scale = self.backbone_scale
        return {"connector": self.lr_connector, "vision": self.lr_vision * scale, "llm": self.lr_llm * scale}

    def warmup_of(self, steps: int) -> int:
        """Warm-up steps of a run of so many."""
        return max(1, round(self.warmup_share * steps)) if self.warmup_share else self.warmup_steps

    @model_validator(mode="after")
    def _one_warm_up(self) -> Self:
        if self.warmup_share and self.warmup_steps:
            raise ValueError("give one of warmup_steps and warmup_share")
        return self

    @model_validator(mode="after")
    def _converges_to_a_backbone(self) -> Self:
        peaks = self.peaks
        if self.schedule == "converging" and not (peaks["connector"] and max(peaks["vision"], peaks["llm"])):
            raise ValueError(
                "schedule 'converging' needs a learning rate above 0 for the connector and for a backbone: "
                "give lr_connector and lr_vision or lr_llm, or choose another schedule"
            )
        return self


CompiledPart = Literal["encoder", "queries", "llm"]
COMPILED_PARTS: tuple[CompiledPart, ...] = ("encoder", "queries", "llm")


class MicroBatch(Settings):
    """The most that one rank computes in one forward.

    A step's samples are dealt into as few micro-batches as these budgets allow, all of nearly equal cost: a frame or a token costs its
    share of its budget. A sample that alone is above a budget is a micro-batch of its own.
    """

    frames: Positive = 512
    """Different frames, each of which is encoded once."""
    tokens: Positive = 8192
    """Positions of the packed sequence, text and visual tokens."""


class ProfileSettings(Settings):
    """Steps that torch's profiler watches. They leave `profile/trace.json`, for https://ui.perfetto.dev, and `profile/table.txt`, the
    operations by time."""

    steps: Positive = 3
    """Steps that are watched."""
    after: Annotated[int, Field(ge=0)] = 10
    """Steps of this start that come before: compiling and warming up are over."""


class RunSettings(Settings):
    """How the run goes: length, batch, evaluation, checkpoints, machine."""

    steps: Positive | None = None
    """Optimizer steps; or give budget_flops."""
    budget_flops: Annotated[float, Field(gt=0)] | None = None
    """Training FLOPs that decide the number of steps (see `fvlm_core.model.flops`)."""
    batch_samples: Positive = 32
    """Samples per optimizer step over all ranks and micro-batches."""
    micro_batch: MicroBatch = MicroBatch()
    """What a rank computes at a time; the rest of a step is gradient accumulation. Another value changes rounding, nothing else."""
    eval_every: Positive = 50
    """Steps between validation losses (one CSV row each); the last step always evaluates."""
    eval_samples: Positive = 64
    """Validation samples of each evaluation, always the same ones."""
    checkpoint_every: Positive = 50
    """Steps between checkpoints; the last step always makes one."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of new weights, the order of the samples, and whatever else is drawn."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    threads: Annotated[int, Field(ge=0)] = 1
    """torch CPU threads per rank; 0 leaves torch's default."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast over fp32 master weights."""
    compile: bool | list[CompiledPart] = False
    """`torch.compile`: nothing, everything (true), or some parts; encoder: its layers; queries: their way through those layers;
    llm: its layers and loss."""
    autotune: bool = False
    """What is compiled also takes matrix products that the compiler writes, with what follows them, where it measures them to be faster.
    Takes minutes when a run starts."""
    gradient_checkpointing: bool = False
    """Compute a layer's activations again in the backward pass instead of keeping them: less memory, more time."""
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    """What several ranks do with weights, gradients and AdamW's state. ddp: each holds all of them; fsdp2: each holds a part, and
    gathers the weights of a layer when a step needs them."""
    wandb: Literal["auto", "offline", "disabled"] = "auto"
    """auto: online where WANDB_API_KEY is set, else offline."""
    on_divergence: Literal["freeze", "end"] = "freeze"
    """What a run does that diverges. freeze: it goes back to the last good checkpoint and freezes the next part of the model; end: it ends
    with that checkpoint and says so, because a run that is compared must not become another experiment."""
    profile: Annotated[ProfileSettings | None, EXECUTION] = None
    """None: no step is profiled."""

    @property
    def compiled_parts(self) -> tuple[CompiledPart, ...]:
        """The parts that `compile` means."""
        if isinstance(self.compile, bool):
            return COMPILED_PARTS if self.compile else ()
        return tuple(self.compile)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.budget_flops is None):
            raise ValueError("give exactly one of steps and budget_flops")
        return self


class Recipe(Settings):
    """One training run."""

    name: str
    """Appears in logs, run names and wandb, e.g. `stage2`."""
    phase: str = "train"
    """The wandb project is `foveated-vlm-{phase}`."""
    output: Path
    """Folder of the run: checkpoints, `metrics.csv`, `progress.json`, `model/`, `manifest.json`."""
    shards: Path
    """Folder of a ShardManifest."""
    init_from: Path | None = None
    """Folder of an earlier run (its `model/` is the start), or None to start from the model's own settings."""
    model: ModelSettings
    data: DataSettings
    loss: LossSettings = LossSettings()
    dpo: DpoSettings | None = None
    """Train on preference pairs instead of labelled tokens; `run.batch_samples` and the like then count pairs."""
    best: BestSettings = BestSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    run: RunSettings

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.loss.fine) != self.model.fine_iterations:
            raise ValueError(
                f"loss.fine has {len(self.loss.fine)} weights, model.fine_iterations is {self.model.fine_iterations}: one each"
            )
        if sum([self.loss.coarse, *self.loss.fine][-1:]) <= 0:
            raise ValueError("the last pass must have a loss weight above 0")
        if (self.dpo is None) != (self.data.loss_on != "preferences"):
            raise ValueError("dpo and data.loss_on 'preferences' go together")
        evaluated = self.passes
        if unknown := sorted(self.best.passes.keys() - set(evaluated)):
            raise ValueError(f"best.passes names {', '.join(unknown)}; passes with a loss weight: {', '.join(evaluated)}")
        if self.best.passes and not any(self.best.passes.values()):
            raise ValueError("best.passes needs a weight above 0")
        if self.best.drift and len(evaluated) < 2:
            raise ValueError("best.drift needs two passes with a loss weight")
        return self

    @property
    def passes(self) -> list[str]:
        """The passes with a loss weight, in order: `coarse`, `fine1`, ..."""
        weights = {"coarse": self.loss.coarse} | {f"fine{number}": weight for number, weight in enumerate(self.loss.fine, 1)}
        return [name for name, weight in weights.items() if weight]

    def identity(self, inputs: dict[str, str]) -> str:
        """Hash of the settings without paths, plus the digests of the inputs the paths point at.

        Like the number of ranks, the way a model is spread over them is no part of it: a run may go on with another.
        """
        portable = self.model_copy(update={"model": self.model.portable(), "run": self.run.model_copy(update={"sharding": "ddp"})})
        return hash_json([portable.hash(exclude={"output", "shards", "init_from"}), inputs])
