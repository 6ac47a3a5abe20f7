"""Checkpoints of the original fVLM (`sanps/fVLM-135M`, `-1.7B`) to ours and back, with the same function.

The original keeps two linear layers after the query (`encoder.output_proj`, then `dino_to_llm`, times 0.14); ours is one, so
they are multiplied together on the way in, and on the way out `output_proj` is the identity. It writes no token before a
video and uses one fine iteration.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fvlm_core.errors import UserError
from fvlm_core.model.encoder import Encoder
from fvlm_core.model.foveated import FoveatedVLM

VISUAL_SCALE = 0.14
"""The factor that the original multiplies visual tokens with."""
_SHARED = {
    "query_input_proj.weight": "encoder.query_input_proj.weight",
    "query_head.weight": "llm_to_query.weight",
    "query_head.bias": "llm_to_query.bias",
    "q_static": "q_static",
    "q_init": "q_init",
}
"""Connector parameters that differ by name only."""


def load_original(model: FoveatedVLM, state: Mapping[str, Tensor]) -> None:
    """Fill a deep, one-token model of fitting shapes with the original's weights (fp32).

    Raises UserError where the model is of another kind, or weights are missing or of another shape.
    """
    _check(model)
    state = {name: tensor.float() for name, tensor in state.items()}
    try:
        ours = {f"connector.{name}": state[theirs] for name, theirs in _SHARED.items()}
        outer, inner = state["dino_to_llm.weight"], state["encoder.output_proj.weight"]
        ours["connector.visual_proj.weight"] = VISUAL_SCALE * outer @ inner
        ours["connector.visual_proj.bias"] = VISUAL_SCALE * (outer @ state["encoder.output_proj.bias"] + state["dino_to_llm.bias"])
        dino = {name.removeprefix("encoder.dino."): tensor for name, tensor in state.items() if name.startswith("encoder.dino.")}
        ours |= {f"encoder.{name}": tensor for name, tensor in Encoder.from_dinov2_state(dino).items()}
        ours |= {name: tensor for name, tensor in state.items() if name.startswith("llm.")}
        ours["llm.lm_head.weight"] = state.get("llm.lm_head.weight", state["llm.model.embed_tokens.weight"])
        model.load_state_dict(ours)
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"not a checkpoint of the original fVLM, or of another size: {error}",
            where="the checkpoint's parameters",
            fix="use the weights of sanps/fVLM-135M or -1.7B with a model of the same DINOv2 and SmolLM2",
        ) from error


def to_original(model: FoveatedVLM, *, old_names: bool = True) -> dict[str, Tensor]:
    """The original's state dict with the model's function; `old_names`: DINOv2's names before transformers 5.18, which it needs.

    Raises UserError for a model it cannot express.
    """
    _check(model)
    ours = model.state_dict()
    width = model.encoder.config.hidden_size
    state = {theirs: ours[f"connector.{name}"] for name, theirs in _SHARED.items()}
    state["encoder.output_proj.weight"] = torch.eye(width)
    state["encoder.output_proj.bias"] = torch.zeros(width)
    state["dino_to_llm.weight"] = ours["connector.visual_proj.weight"] / VISUAL_SCALE
    state["dino_to_llm.bias"] = ours["connector.visual_proj.bias"] / VISUAL_SCALE
    for name, tensor in model.encoder.to_dinov2().state_dict().items():
        name = _old_name(name) if old_names else name
        state[f"encoder.dino.{name}"] = tensor
    tied = model.llm.config.tie_word_embeddings
    state |= {name: tensor for name, tensor in ours.items() if name.startswith("llm.") and not (tied and name == "llm.lm_head.weight")}
    return state


def _check(model: FoveatedVLM) -> None:
    settings = model.settings
    if settings.query != "deep" or settings.tokens_per_frame != 1 or settings.film_head_width or settings.temperature != 1:
        raise UserError(
            "the original fVLM has deep queries, one token per frame, no FiLM head and temperature 1",
            where="model settings",
            fix="convert with such a model",
        )


def _old_name(name: str) -> str:
    """A Dinov2Model parameter's name before transformers 5.18."""
    for part, old in (("q", "query"), ("k", "key"), ("v", "value")):
        name = name.replace(f".attention.{part}_proj.", f".attention.attention.{old}.")
    name = name.replace(".attention.o_proj.", ".attention.output.dense.")
    return re.sub(r"^layers?\.(\d+)\.", r"encoder.layer.\1.", name)
