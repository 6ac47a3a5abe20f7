"""What a sample costs in FLOPs, from the configuration alone.

Multiplications and additions of matrix products and attention, counted as `torch.utils.flop_counter` counts them: a
product of [m, k] and [k, n] is 2mkn, attention counts its whole square. Norms, activations and softmax are left out, as
there. Backward is twice forward for products (once where the input needs no gradient: the patches' own), 2.5 times for
attention, which recomputes its weights (Dao 2023, https://arxiv.org/abs/2307.08691, section 3.1).
"""

from dataclasses import dataclass

from fvlm_core.config import LossSettings, ModelSettings


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
    first_product: float = 0.0
    """The patch embedding: pixels need no gradient."""
    attention: float = 0.0
    forward_only: float = 0.0

    @property
    def forward(self) -> float:
        return self.products + self.first_product + self.attention + self.forward_only

    @property
    def train(self) -> float:
        """Forward and backward, everything trained."""
        return 3 * self.products + 2 * self.first_product + 3.5 * self.attention + self.forward_only


def sample_flops(model: ModelSettings, dims: ModelDims, shape: SampleShape, loss: LossSettings) -> Flops:
    """Cost of one sample in a training step (`.train`) or of its forward (`.forward`)."""
    cost = Flops()
    k = model.tokens_per_frame
    _encode(cost, model, dims, shape.frames)
    length = shape.text_tokens + k * shape.shown
    weights = [loss.coarse, *loss.fine]
    if not shape.shown:
        _llm(cost, dims, length)
        cost.products += 2 * shape.labels * dims.llm_width * dims.vocab_size
        return cost
    for number, weight in enumerate(weights):
        last = number == len(weights) - 1
        if model.query == "random" and not (weight or last):
            continue
        queries = k * (shape.shown if number else shape.frames)
        if number and model.query != "random":
            cost.products += 2 * queries * dims.llm_width * dims.vision_width
        _query(cost, model, dims, queries, watched=last)
        _llm(cost, dims, max(0 if last else shape.query_prefix, length if weight else 0))
        if weight:
            cost.products += 2 * shape.labels * dims.llm_width * dims.vocab_size
    return cost


def samples_for(budget_flops: float, flops_per_sample: float) -> int:
    """How many samples a budget pays for, at least one."""
    return max(1, round(budget_flops / flops_per_sample))


def _encode(cost: Flops, model: ModelSettings, dims: ModelDims, frames: int) -> None:
    width, tokens = dims.vision_width, dims.patches + 1
    needs_patches = model.query in ("pooled", "shallow")
    full_layers = dims.vision_layers - (0 if needs_patches else 1)
    cost.first_product += frames * 2 * dims.patches * 3 * dims.patch_px**2 * width
    cost.products += frames * full_layers * 2 * tokens * width * (4 * width + 2 * dims.vision_mlp)
    cost.attention += frames * full_layers * 4 * tokens**2 * width
    if not needs_patches or model.query == "shallow":
        # the last layer's keys and values, or the shallow query's own
        cost.products += frames * 2 * tokens * width * 2 * width


def _query(cost: Flops, model: ModelSettings, dims: ModelDims, queries: int, *, watched: bool) -> None:
    """`watched`: the attention weights are computed once more, for their entropy."""
    width, tokens = dims.vision_width, dims.patches + 1
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
    cost.products += queries * dims.vision_layers * 2 * width * (2 * width + 2 * dims.vision_mlp)
    cost.attention += queries * dims.vision_layers * 4 * tokens * width
    if watched:
        cost.forward_only += queries * 2 * width * (width + tokens)


def _llm(cost: Flops, dims: ModelDims, length: int) -> None:
    width = dims.llm_width
    per_token = 2 * width * (2 * width + 2 * dims.llm_kv_width + 3 * dims.llm_mlp)
    cost.products += dims.llm_layers * length * per_token
    cost.attention += dims.llm_layers * 4 * length**2 * width
