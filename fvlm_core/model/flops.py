"""Compute the FLOPs of a sample from the configuration alone.

Counts multiplications and additions of matrix products and attention, like `torch.utils.flop_counter`: a product of [m, k] and [k, n] is
2mkn, and causal attention counts as full attention. Norms, activations and softmax are not counted. The backward pass of a product is twice
its forward pass (once if either the input or the weights need no gradient), and 2.5 times for attention, which recomputes its weights
(Dao 2023, https://arxiv.org/abs/2307.08691, section 3.1).
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from fvlm_core.config import GlanceSettings, LossSettings, ModelSettings

Backbone = Literal["vision", "llm"]


@dataclass(frozen=True)
class ModelDims:
    """The model sizes that determine the FLOPs."""

    vision_width: int
    vision_mlp: int
    vision_layers: int
    patch_px: int
    frame_px: int
    llm_width: int
    llm_kv_width: int
    llm_mlp: int
    llm_layers: int
    vocab_size: int

    @classmethod
    def from_configs(cls, vision: dict, llm: dict, frame_px: int) -> "ModelDims":
        """Read the sizes from the values of transformers' `Dinov2Config` and `LlamaConfig`."""
        head = llm.get("head_dim") or llm["hidden_size"] // llm["num_attention_heads"]
        return cls(
            vision_width=vision["hidden_size"],
            vision_mlp=int(vision["hidden_size"] * vision["mlp_ratio"]),
            vision_layers=vision["num_hidden_layers"],
            patch_px=vision["patch_size"],
            frame_px=frame_px,
            llm_width=llm["hidden_size"],
            llm_kv_width=head * llm["num_key_value_heads"],
            llm_mlp=llm["intermediate_size"],
            llm_layers=llm["num_hidden_layers"],
            vocab_size=llm["vocab_size"],
        )

    @property
    def patches(self) -> int:
        return (self.frame_px // self.patch_px) ** 2


@dataclass(frozen=True)
class SampleShape:
    """The numbers of frames and tokens of one sample."""

    frames: int
    """Number of distinct frames: an image shown 8 times is one frame."""
    shown: int
    """Number of shown frames: an image shown 8 times counts 8 times."""
    text_tokens: int
    """Number of text tokens up to the last labelled position; the loss does not depend on later ones."""
    labels: int
    """Number of labelled tokens."""
    query_prefix: int
    """Number of tokens up to and including the last one that a query is predicted from; see `PackedBatch.query_prefix`."""


@dataclass
class Flops:
    """Forward FLOPs, split by the cost of their backward pass."""

    products: float = 0.0
    """Matrix products with gradients of input and weights."""
    half_backward: float = 0.0
    """Matrix products with one gradient only: the patch embedding (pixels need none) and layers with frozen weights."""
    attention: float = 0.0
    forward_only: float = 0.0
    """FLOPs without a backward pass."""

    @property
    def forward(self) -> float:
        return self.products + self.half_backward + self.attention + self.forward_only

    @property
    def train(self) -> float:
        """FLOPs of the forward and backward pass."""
        return 3 * self.products + 2 * self.half_backward + 3.5 * self.attention + self.forward_only

    def frozen(self, *, reached: bool) -> "Flops":
        """Return the FLOPs if these weights are frozen. `reached`: gradients still flow through to trained parameters before them."""
        if not reached:
            return Flops(forward_only=self.forward)
        return Flops(half_backward=self.products + self.half_backward, attention=self.attention, forward_only=self.forward_only)

    def add(self, other: "Flops") -> None:
        self.products += other.products
        self.half_backward += other.half_backward
        self.attention += other.attention
        self.forward_only += other.forward_only


def sample_flops(
    model: ModelSettings, dims: ModelDims, shape: SampleShape, loss: LossSettings, *, frozen: Collection[Backbone] = ()
) -> Flops:
    """FLOPs of one sample: `.train` of a training step with the `frozen` backbones, `.forward` of the forward passes alone."""
    cost = Flops()
    k, glance = model.tokens_per_frame, model.glance
    _encode(cost, model, dims, shape.frames, frozen="vision" in frozen)
    length = shape.text_tokens + k * shape.shown
    weights = [loss.coarse, *loss.fine]
    if not shape.shown:
        text = _llm(dims, length, shape.labels)
        cost.add(text.frozen(reached=False) if "llm" in frozen else text)
        return cost
    for number, weight in enumerate(weights):
        last = number == len(weights) - 1
        if model.query == "random" and not (weight or last):
            continue
        queries = k * (shape.shown if number else shape.frames)
        if number and model.query != "random":
            cost.products += 2 * queries * dims.llm_width * dims.vision_width
        if number and glance is not None:
            taught = glance.train_on == "chosen" and glance.distill > 0
            _open(cost, glance, dims, queries, watched=last or taught, frozen="vision" in frozen)
        _query(cost, model, dims, queries, opened=number > 0, watched=last, frozen="vision" in frozen)
        read = _llm(dims, max(0 if last else shape.query_prefix, length if weight else 0), shape.labels if weight else 0)
        cost.add(read.frozen(reached=True) if "llm" in frozen else read)
    return cost


def samples_for(budget_flops: float, flops_per_sample: float) -> int:
    """Number of samples that fit into a FLOP budget, at least one."""
    return max(1, round(budget_flops / flops_per_sample))


def _encode(cost: Flops, model: ModelSettings, dims: ModelDims, frames: int, *, frozen: bool) -> None:
    encode = Flops()
    width, patches = dims.vision_width, _encoded(model, dims)
    tokens = patches + 1
    needs_patches = model.query in ("pooled", "shallow")
    full_layers = dims.vision_layers - (0 if needs_patches else 1)
    encode.half_backward += frames * 2 * patches * 3 * dims.patch_px**2 * width
    encode.products += frames * full_layers * 2 * tokens * width * (4 * width + 2 * dims.vision_mlp)
    encode.attention += frames * full_layers * 4 * tokens**2 * width
    keys_values = frames * 2 * tokens * width * 2 * width
    if not needs_patches:
        encode.products += keys_values
    cost.add(encode.frozen(reached=False) if frozen else encode)
    if model.glance is not None and model.glance.train_on == "all":
        for children in _children(model.glance, patches):
            cost.add(_tower(dims, frames, children, children + tokens, frozen=frozen))
    if model.query == "shallow":  # has its own key and value projections
        cost.add(Flops(half_backward=keys_values) if frozen else Flops(products=keys_values))


def _encoded(model: ModelSettings, dims: ModelDims) -> int:
    """Number of patches of a frame that are always encoded: all of them, or those of the glance."""
    return dims.patches if model.glance is None else dims.patches // model.glance.shrink**2


def _children(glance: GlanceSettings, patches: int) -> list[int]:
    """Number of encoded patches of each level: all of them with `train_on: all`, otherwise the children of the chosen patches."""
    children = []
    for zoom in glance.zooms:
        patches = zoom**2 * (patches if glance.train_on == "all" else min(glance.open, patches))
        children.append(patches)
    return children


def _tower(dims: ModelDims, times: int, patches: int, context: int, *, frozen: bool) -> Flops:
    """FLOPs of encoding opened patches up to the last layer's keys and values, each patch attending to `context` tokens."""
    width, layers = dims.vision_width, dims.vision_layers - 1
    embed = times * 2 * patches * 3 * dims.patch_px**2 * width
    inner = Flops(
        products=times * (layers * 2 * patches * width * (4 * width + 2 * dims.vision_mlp) + 2 * patches * width * 2 * width),
        attention=times * layers * 4 * patches * context * width,
    )
    cost = Flops(forward_only=embed) if frozen else Flops(half_backward=embed)
    cost.add(inner.frozen(reached=True) if frozen else inner)  # the trained scale embeddings come before
    return cost


def _open(cost: Flops, glance: GlanceSettings, dims: ModelDims, queries: int, *, watched: bool, frozen: bool) -> None:
    """Add the FLOPs of choosing and opening patches, level by level; `_query` adds those of the final read.

    `watched`: the attention weights are computed once more, for their entropy or for distillation.
    """
    width, tokens = dims.vision_width, dims.patches // glance.shrink**2 + 1
    glance_tokens = tokens
    for children in _children(glance, tokens - 1):
        through = Flops(
            products=queries * (dims.vision_layers - 1) * 2 * width * (2 * width + 2 * dims.vision_mlp)
            + queries * 2 * width * (width + tokens),
            attention=queries * (dims.vision_layers - 1) * 4 * tokens * width,
        )
        cost.add(through.frozen(reached=True) if frozen else through)
        if glance.train_on == "chosen":
            cost.add(_tower(dims, queries, children, children + glance_tokens, frozen=frozen))
        tokens += children
    if watched:
        cost.forward_only += queries * 2 * width * (width + tokens)


def _query(cost: Flops, model: ModelSettings, dims: ModelDims, queries: int, *, opened: bool, watched: bool, frozen: bool) -> None:
    """Add the FLOPs of reading frames with queries and of the projections before and after.

    `opened`: the queries have opened patches. `watched`: the attention weights are computed once more, for their entropy. `frozen`: the
    encoder is frozen.
    """
    width, tokens = dims.vision_width, _encoded(model, dims) + 1
    if model.glance is not None and opened:
        tokens += sum(_children(model.glance, tokens - 1))
        watched = False  # already counted by `_open`
    cost.products += queries * 2 * width * dims.llm_width
    if model.film_head_width:
        cost.products += queries * 2 * width * 4 * model.film_head_width
    if model.query == "pooled":
        return
    cost.products += queries * 2 * width**2
    if model.query == "shallow":
        cost.products += queries * 2 * width**2
        cost.attention += queries * 4 * tokens * width
        cost.forward_only += queries * 2 * tokens * width if watched else 0
        return
    through = Flops(
        products=queries * dims.vision_layers * 2 * width * (2 * width + 2 * dims.vision_mlp),
        attention=queries * dims.vision_layers * 4 * tokens * width,
    )
    cost.add(through.frozen(reached=True) if frozen else through)
    if watched:
        cost.forward_only += queries * 2 * width * (width + tokens)


def _llm(dims: ModelDims, length: int, labels: int) -> Flops:
    """FLOPs of the language model on `length` tokens, with logits for `labels` of them."""
    width = dims.llm_width
    per_token = 2 * width * (2 * width + 2 * dims.llm_kv_width + 3 * dims.llm_mlp)
    return Flops(
        products=dims.llm_layers * length * per_token + 2 * labels * width * dims.vocab_size,
        attention=dims.llm_layers * 4 * length**2 * width,
    )
