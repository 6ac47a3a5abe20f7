"""The settings classes of a training recipe: one YAML file describes one training run.

`torchrun -m fvlm_core.train recipe.yaml` reads a `Recipe`. Its parts reject unknown keys and are reused by the phases of the
pipeline. `Recipe.identity` excludes paths (shards, checkpoints, output), so a run keeps its identity when the volume moves.
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
    """A randomly initialised DINOv2 of the given shape."""

    width: Positive = 384
    """Hidden size."""
    layers: Positive = 12
    """Number of transformer layers."""
    heads: Positive = 6
    """Number of attention heads; must divide the width."""
    patch_px: Positive = 14
    """Side of a patch, in pixels."""
    layerscale: float = 1.0
    """Initial LayerScale value; 1.0 is the default of transformers' `Dinov2Config`."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} do not divide width {self.width}")
        return self


class LLMShape(Settings):
    """A randomly initialised Llama of the given shape; the vocabulary size comes from the tokenizer."""

    width: Positive = 576
    """Hidden size."""
    layers: Positive = 30
    """Number of transformer layers."""
    heads: Positive = 9
    """Number of attention heads; the width of a head (`width` / `heads`) must be an even integer."""
    kv_heads: Positive = 3
    """Number of key-value heads (grouped-query attention); must divide `heads`."""
    mlp_width: Positive = 1536
    """Hidden size of the feed-forward layers."""
    context: Positive = 8192
    """Maximum sequence length, in tokens."""
    rope_theta: float = 100_000.0
    """Base of the rotary position embeddings (RoPE)."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} / heads {self.heads} is not an even integer, which rotary embeddings need")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} do not divide heads {self.heads}")
        return self


class VisionSettings(Settings):
    """The vision encoder: a pretrained checkpoint, or a shape with random weights. Exactly one of the two must be given."""

    checkpoint: NameOrFolder | None = None
    """Hub name or local folder of a DINOv2, e.g. `facebook/dinov2-small`."""
    shape: VisionShape | None = None
    frame_px: Positive = 224
    """Side of the square input frames, in pixels; a multiple of the patch size."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.checkpoint is None) == (self.shape is None):
            raise ValueError("give exactly one of checkpoint and shape")
        if self.shape is not None and self.frame_px % self.shape.patch_px:
            raise ValueError(f"frame_px {self.frame_px} is not a multiple of shape.patch_px {self.shape.patch_px}")
        return self


class LLMSettings(Settings):
    """The language model: a pretrained checkpoint, or a shape with random weights. Exactly one of the two must be given."""

    checkpoint: NameOrFolder | None = None
    """Hub name or local folder of a Llama, e.g. `HuggingFaceTB/SmolLM2-135M-Instruct`."""
    layers: Positive | None = None
    """Keep only the first `layers` layers of the checkpoint, for model sizes between the published ones. None keeps all."""
    shape: LLMShape | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.checkpoint is None) == (self.shape is None):
            raise ValueError("give exactly one of checkpoint and shape")
        if self.layers is not None and self.shape is not None:
            raise ValueError("layers applies to a checkpoint only; with a shape, set shape.layers")
        return self


class GlanceSettings(Settings):
    """Gaze before encode: a frame is encoded at low resolution (the glance), and the query selects patches to encode at high resolution.

    `vision.frame_px` must equal `px` x `zoom` ^ `levels`, or `px` times the product of a list of zooms. The method and its measurements
    are in docs/foveation.md.
    """

    px: Positive = 112
    """Side of the glance, the low-resolution frame that is always encoded, in pixels; a multiple of the patch size."""
    zoom: Zoom | Annotated[list[Zoom], Field(min_length=1, max_length=6)] = 2
    """An opened patch is encoded as `zoom` x `zoom` finer patches. A list gives one zoom per level. Fewer levels with larger zooms reach
    the same resolution faster, because every level is one more pass through the encoder."""
    levels: Annotated[int, Field(ge=1, le=6)] = 1
    """Number of zoom levels. Above 1, the opened patches with the most attention are opened in turn: 112 px with zoom 2 and 3 levels gives
    896 px frames, of which only the details under a few patches are encoded."""
    open: Positive = 4
    """Number of patches that a query opens at each level, at inference and in training with `train_on: chosen`."""
    train_on: Literal["all", "chosen"] = "all"
    """all: encode every patch and weight it by p, the query's attention over the glance (first training phase); chosen: each query opens
    its own patches, as at inference (second phase)."""
    explore: Annotated[float, Field(ge=0)] = 1.0
    """Scale of the Gumbel noise added to log p with `train_on: chosen`; without noise the selection collapses."""
    distill: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the cross-entropy that trains p towards the query's attention over the opened patches, with `train_on: chosen`. One query
    counts as much as one labelled token."""

    @property
    def zooms(self) -> list[int]:
        """The zoom of each level."""
        return [self.zoom] * self.levels if isinstance(self.zoom, int) else self.zoom

    @property
    def shrink(self) -> int:
        """Ratio of the frame's side to the glance's side."""
        return math.prod(self.zooms)

    @model_validator(mode="after")
    def _a_zoom_per_level(self) -> Self:
        if len(self.zooms) != self.levels:
            raise ValueError(f"zoom has {len(self.zooms)} values, levels is {self.levels}: give one zoom per level")
        return self


class ModelSettings(Settings):
    """The foveated model and its baselines."""

    vision: VisionSettings
    llm: LLMSettings
    query: Literal["deep", "shallow", "random", "pooled"] = "deep"
    """deep: the query attends in every encoder layer; shallow: it attends once, to the last layer; random: deep, with fixed random
    queries (control); pooled: average-pooled patches without queries (baseline)."""
    tokens_per_frame: Literal[1, 4, 9, 16] = 1
    """Visual tokens per frame; each has its own query."""
    fine_iterations: Annotated[int, Field(ge=0, le=8)] = 2
    """Number of fine passes after the coarse pass in training; inference uses one. Must be 0 with `query: pooled`."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the query's attention logits."""
    visual_scale: Annotated[float, Field(gt=0)] = 0.14
    """Standard deviation of the visual tokens at initialisation; close to that of the LLM's text embeddings (0.14 for SmolLM2)."""
    film_head_width: Annotated[int, Field(ge=0)] = 0
    """Width of the FiLM-conditioned prediction head (capacity ablation); 0 disables it."""
    glance: GlanceSettings | None = None
    """None encodes every frame at full resolution."""

    def identity_values(self) -> dict[str, Any]:
        """The identity values, without `glance` if it is None: models from before this setting existed keep their identity."""
        values = super().identity_values()
        return values if self.glance else {name: value for name, value in values.items() if name != "glance"}

    @model_validator(mode="after")
    def _glance_fits(self) -> Self:
        if self.glance is None:
            return self
        if self.query != "deep":
            raise ValueError("glance needs query 'deep': the query's attention in every layer selects and reads the patches")
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
            raise ValueError("fine_iterations must be 0 with query 'pooled', and at least 1 with any other query")
        return self

    def portable(self) -> Self:
        """A copy in which local checkpoint folders are reduced to their names, so that it does not depend on where they are stored."""
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
    """Share of samples or of tokens (see `data.shares_of`); the shares of a mixture must add up to 1."""
    max_epochs: Annotated[float, Field(gt=0)] | None = None
    """Maximum number of epochs over this source; a run that would exceed it is refused before it starts. None: no limit. Every epoch is
    shuffled anew."""


def _whole(mixture: list[SourceShare]) -> list[SourceShare]:
    if abs(sum(part.share for part in mixture) - 1) > 1e-6:
        raise ValueError("the shares of the mixture must add up to 1")
    if len({part.source for part in mixture}) < len(mixture):
        raise ValueError("a source appears twice in the mixture")
    return mixture


SourceShares = Annotated[list[SourceShare], Field(min_length=1), AfterValidator(_whole)]


class ValidationSettings(Settings):
    """A validation mixture that differs from the training mixture."""

    mixture: SourceShares
    question_first: Share = 0.5
    """Share of validation samples whose question comes before the frames; see `data.question_first`."""
    loss_on: Literal["all_text", "answers"] = "answers"
    """Tokens that the validation loss averages over. all_text: questions and answers; answers: answers only."""


class StagingSettings(Settings):
    """A local cache for shards on a network volume: each shard is copied to the local disk once, as a whole, and read from there."""

    folder: Path
    """Cache folder on the local disk, shared by all ranks and loader processes of a machine. Other files in it are not touched."""
    max_gb: Annotated[float, Field(gt=0)] = 50.0
    """Size limit of the cache in GB (1e9 bytes); the least recently read shards are evicted first. A shard that does not fit is read
    where it is."""


class DataSettings(Settings):
    """The data mixture and how batches are built from it."""

    mixture: SourceShares
    shares_of: Literal["samples", "tokens"] = "samples"
    """Unit of the mixture's shares. tokens: text and visual tokens of the packed sequence, estimated from each source's mean."""
    question_first: Share = 0.5
    """Share of question-answer samples whose question comes before the frames."""
    loss_on: Literal["all_text", "answers", "preferences"] = "answers"
    """Tokens with a loss. all_text (captioning, stage 1): questions and answers; answers: answers only; preferences (with `dpo`): every
    sample is a pair of a chosen and a rejected answer."""
    image_repeats: Positive = 8
    """An image is shown as a still video of this many frames; it is encoded once."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Data loader processes per rank; 0 loads in the training process."""
    shuffle_shards: Positive | None = None
    """None: every epoch shuffles all samples of a source. A number: every epoch shuffles the source's shards, and then its samples within
    windows of this many shards, so that nearby reads come from few files (see `staging`)."""
    staging: Annotated[StagingSettings | None, EXECUTION] = None
    """None reads shards where they are."""

    validation: ValidationSettings | None = None
    """None validates on the training mixture. To compare runs that train on different data, give them all the same validation mixture."""

    @property
    def held_out(self) -> Self:
        """The data settings for validation. `shuffle_shards` and `shares_of` are reset, so that the validation set depends neither on how
        training reads its shards nor on the length of a model's samples."""
        if self.validation is None:
            return self.model_copy(update={"shuffle_shards": None, "shares_of": "samples"})
        return self.model_copy(update={**dict(self.validation), "validation": None, "shuffle_shards": None, "shares_of": "samples"})

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        if self.loss_on == "preferences" and self.validation is not None:
            raise ValueError("preferences are validated on preferences: leave data.validation out")
        return self


class LossSettings(Settings):
    """Weights of the text losses of the passes (normalised to add up to 1).

    A loss on every pass also trains queries computed from the hidden states of fine passes. Without it, autoregressive inference drifts.
    """

    coarse: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the coarse pass."""
    fine: list[Annotated[float, Field(ge=0)]] = Field(default_factory=lambda: [1.0, 1.0])
    """One weight per fine iteration; the last must be above 0."""


class DpoSettings(Settings):
    """Direct preference optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290). The reference is the model that the run
    starts from.

    Every pass with a loss weight has its own DPO loss and reference log-probabilities, because each pass is a way to run the model.
    """

    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the penalty on moving away from the reference: the loss is -log sigmoid(beta * margin over the reference)."""


class BestSettings(Settings):
    """Checkpoint score (lower is better): the weighted mean of the passes' validation losses, plus a penalty on drift."""

    use: Literal["best", "last"] = "best"
    """Final weights of the run: those of the checkpoint with the lowest score (best) or those of the last step (last)."""

    passes: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Weight of each pass's loss by the pass's name (`coarse`, `fine1`, ...), normalised to add up to 1. Empty: the last pass alone."""
    drift: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the absolute difference between the losses of the last two passes. Their queries come from hidden states of different
    kinds, as do the queries of training and of autoregressive inference; a model that is sensitive to this drifts over a long video."""


class OptimizerSettings(Settings):
    """AdamW, with a learning rate for each of connector, vision encoder and language model, and their schedule."""

    lr_connector: Annotated[float, Field(ge=0)] = 1e-3
    """Peak learning rate of the connector: queries, projections and all other parameters outside the two backbones."""
    lr_vision: Annotated[float, Field(ge=0)] = 1e-5
    """Peak learning rate of the vision encoder; 0 freezes it."""
    lr_llm: Annotated[float, Field(ge=0)] = 1e-5
    """Peak learning rate of the language model; 0 freezes it."""
    backbone_scale: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the learning rates of both backbones; 0 trains only the connector."""
    schedule: Literal["cosine", "constant", "wsd", "converging"] = "cosine"
    """Learning-rate schedule. wsd: warm up, stay constant, decay over the last fifth of the steps; converging: the connector's learning
    rate moves geometrically to the higher of the backbones' learning rates."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear learning-rate warm-up."""
    warmup_share: Share = 0.0
    """Warm-up as a share of the run's steps, instead of `warmup_steps`, so that short runs also complete it."""
    final_share: Share = 0.05
    """Final learning rate as a share of the peak (cosine, wsd)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW weight decay, applied to matrices only: not to norms, biases, position embeddings or queries."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """AdamW's decay rate of the second moment."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Maximum global gradient norm; larger gradients are scaled down to it."""

    @property
    def peaks(self) -> dict[str, float]:
        """Peak learning rates by role: connector, vision, llm."""
        scale = self.backbone_scale
        return {"connector": self.lr_connector, "vision": self.lr_vision * scale, "llm": self.lr_llm * scale}

    def warmup_of(self, steps: int) -> int:
        """Number of warm-up steps in a run of `steps` steps."""
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
    """Maximum size of one forward pass on one rank.

    The samples of a step are divided into as few micro-batches as these limits allow, of nearly equal cost; frames and tokens are weighted
    by the inverse of their limits. A sample that exceeds a limit by itself forms its own micro-batch.
    """

    frames: Positive = 512
    """Distinct frames; each is encoded once."""
    tokens: Positive = 8192
    """Length of the packed sequence: text and visual tokens."""


class ProfileSettings(Settings):
    """Profile some steps with torch's profiler. Writes `profile/trace.json` (open it in https://ui.perfetto.dev) and `profile/table.txt`
    (operations sorted by time)."""

    steps: Positive = 3
    """Number of steps to profile."""
    after: Annotated[int, Field(ge=0)] = 10
    """Steps to skip after each start of the process, while the model compiles and warms up."""


class RunSettings(Settings):
    """Length, batch size, evaluation, checkpoints and hardware of a run."""

    steps: Positive | None = None
    """Number of optimizer steps. Give exactly one of `steps` and `budget_flops`."""
    budget_flops: Annotated[float, Field(gt=0)] | None = None
    """Training compute in FLOPs, from which the number of steps follows (see `fvlm_core.model.flops`)."""
    batch_samples: Positive = 32
    """Samples per optimizer step, over all ranks and micro-batches."""
    micro_batch: MicroBatch = MicroBatch()
    """Limits of one forward pass on a rank; gradients are accumulated over the micro-batches of a step. The value affects only rounding."""
    eval_every: Positive = 50
    """Steps between evaluations of the validation loss (one CSV row each); the last step is always evaluated."""
    eval_samples: Positive = 64
    """Number of validation samples per evaluation; always the same samples."""
    checkpoint_every: Positive = 50
    """Steps between checkpoints; the last step always writes one."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Random seed for weight initialisation, sample order and all other random draws."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if available, else the CPU."""
    threads: Annotated[int, Field(ge=0)] = 1
    """torch CPU threads per rank; 0 keeps torch's default."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast over fp32 master weights."""
    compile: bool | list[CompiledPart] = False
    """Parts of the model for `torch.compile`: none (false), all (true), or a list. encoder: the encoder layers; queries: the queries'
    attention through the encoder layers; llm: the language model's layers and the loss."""
    autotune: bool = False
    """Let the compiler generate its own matrix multiplications, fused with the operations that follow, wherever it measures them to be
    faster (`max_autotune_gemm`). Adds minutes to the start of a run."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, more time."""
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    """Distribution of weights, gradients and AdamW state over ranks. ddp: replicated on every rank; fsdp2: sharded over the ranks, and the
    weights of a layer are gathered when needed."""
    wandb: Literal["auto", "offline", "disabled"] = "auto"
    """auto: online if WANDB_API_KEY is set, else offline."""
    on_divergence: Literal["freeze", "end"] = "freeze"
    """What to do when the run diverges. freeze: go back to the last good checkpoint and freeze the next part of the model; end: stop with
    that checkpoint and report it, because a run in a comparison must not change its setup midway."""
    profile: Annotated[ProfileSettings | None, EXECUTION] = None
    """None disables profiling."""

    @property
    def compiled_parts(self) -> tuple[CompiledPart, ...]:
        """The parts selected by `compile`."""
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
    """Name of the run in logs, run names and wandb, e.g. `stage2`."""
    phase: str = "train"
    """The wandb project is `foveated-vlm-{phase}`."""
    output: Path
    """Output folder of the run: checkpoints, `metrics.csv`, `progress.json`, `model/`, `manifest.json`."""
    shards: Path
    """Folder of the shards, with their `manifest.json`."""
    init_from: Path | None = None
    """Folder of an earlier run, whose `model/` provides the initial weights. None initialises the model from the `model` settings."""
    model: ModelSettings
    data: DataSettings
    loss: LossSettings = LossSettings()
    dpo: DpoSettings | None = None
    """Train on preference pairs instead of labelled tokens; `run.batch_samples` and `run.eval_samples` then count pairs."""
    best: BestSettings = BestSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    run: RunSettings

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.loss.fine) != self.model.fine_iterations:
            raise ValueError(
                f"loss.fine has {len(self.loss.fine)} weights, model.fine_iterations is {self.model.fine_iterations}: give one each"
            )
        if sum([self.loss.coarse, *self.loss.fine][-1:]) <= 0:
            raise ValueError("the last pass must have a loss weight above 0")
        if (self.dpo is None) != (self.data.loss_on != "preferences"):
            raise ValueError("dpo and data.loss_on 'preferences' go together: set both or neither")
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
        """Hash of the settings without paths, combined with `inputs`, the digests of what the paths point at.

        `run.sharding` is excluded, as the number of ranks is: a run may resume with another value of either.
        """
        portable = self.model_copy(update={"model": self.model.portable(), "run": self.run.model_copy(update={"sharding": "ddp"})})
        return hash_json([portable.hash(exclude={"output", "shards", "init_from"}), inputs])
