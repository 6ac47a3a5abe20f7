"""What a sample costs in FLOPs, from the configuration alone.

Multiplications and additions of matrix products and attention, counted as `torch.utils.flop_counter` counts them: a
product of [m, k] and [k, n] is 2mkn, attention counts its whole square. Norms, activations and softmax are left out, as
there. Backward is twice forward for products (once where the input or the weights need no gradient), 2.5 times for
attention, which recomputes its weights (Dao 2023, https://arxiv.org/abs/2307.08691, section 3.1).
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from fvlm_core.config import GlanceSettings, LossSettings, ModelSettings

Backbone = Literal["vision", "llm"]


@dataclass(frozen=True)
class ModelDims:
    """The sizes that the cost depends on."""

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
        """From the values of transformers' Dinov2Config and LlamaConfig."""
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
    """What one sample holds."""

    frames: int
    """Distinct frames: an image shown 8 times is one."""
    shown: int
    """Shown frames."""
    text_tokens: int
    """Up to the last one whose prediction is a target: the loss needs no others."""
    labels: int
    query_prefix: int
    """Tokens before and including the last query's source; see `PackedBatch.query_prefix`."""


@dataclass
class Flops:
    """A cost in parts whose backward differs."""

    products: float = 0.0
    half_backward: float = 0.0
    """Products with one gradient only: the patch embedding's (pixels need none), those with frozen weights."""
    attention: float = 0.0
    forward_only: float = 0.0

    @property
    def forward(self) -> float:
        return self.products + self.half_backward + self.attention + self.forward_only

    @property
    def train(self) -> float:
        """Forward and backward."""
        return 3 * self.products + 2 * self.half_backward + 3.5 * self.attention + self.forward_only

    def frozen(self, *, reached: bool) -> "Flops":
        """The same with weights that are not trained. `reached`: a gradient still passes through to what is before them."""
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
    """Cost of one sample in a training step (`.train`, with these backbones frozen) or of its forward (`.forward`)."""
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
    """How many samples a budget pays for, at least one."""
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
    if model.query == "shallow":  # its own keys and values
        cost.add(Flops(half_backward=keys_values) if frozen else Flops(products=keys_values))


def _encoded(model: ModelSettings, dims: ModelDims) -> int:
    """Patches of a frame that are encoded whatever the query says."""
    return dims.patches if model.glance is None else dims.patches // model.glance.shrink**2


def _children(glance: GlanceSettings, patches: int) -> list[int]:
    """Patches of each level that are encoded: every one in training on all, those under the chosen ones otherwise."""
    children = []
    for zoom in glance.zooms:
        patches = zoom**2 * (patches if glance.train_on == "all" else min(glance.open, patches))
        children.append(patches)
    return children


def _tower(dims: ModelDims, times: int, patches: int, seen: int, *, frozen: bool) -> Flops:
    """Opened patches, embedded and up to their keys and values, each attending to `seen` tokens."""
    width, layers = dims.vision_width, dims.vision_layers - 1
    embed = times * 2 * patches * 3 * dims.patch_px**2 * width
    inner = Flops(
        products=times * (layers * 2 * patches * width * (4 * width + 2 * dims.vision_mlp) + 2 * patches * width * 2 * width),
        attention=times * layers * 4 * patches * seen * width,
    )
    cost = Flops(forward_only=embed) if frozen else Flops(half_backward=embed)
    cost.add(inner.frozen(reached=True) if frozen else inner)  # what tells the resolutions apart is trained, and added before
    return cost


def _open(cost: Flops, glance: GlanceSettings, dims: ModelDims, queries: int, *, watched: bool, frozen: bool) -> None:
    """What queries cost before and beside the read that makes the token: choosing, level by level, and opening what was chosen."""
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
    """`opened`: patches were. `watched`: the attention weights are computed once more, for their entropy. `frozen`: the encoder is."""
    width, tokens = dims.vision_width, _encoded(model, dims) + 1
    if model.glance is not None and opened:
        tokens += sum(_children(model.glance, tokens - 1))
        watched = False  # counted with what chose them
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
    """The language model over `length` tokens, and the logits of `labels` of them."""
    width = dims.llm_width
    per_token = 2 * width * (2 * width + 2 * dims.llm_kv_width + 3 * dims.llm_mlp)
    return Flops(
        products=dims.llm_layers * length * per_token + 2 * labels * width * dims.vocab_size,
        attention=dims.llm_layers * 4 * length**2 * width,
    )
