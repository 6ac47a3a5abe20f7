"""Checkpoints of the original fVLM (`sanps/fVLM-135M`, `-1.7B`) to ours and back, with the same function.

The original keeps two linear layers after the query (`encoder.output_proj`, then `dino_to_llm`, times 0.14); ours is one, so
they are multiplied together on the way in, and on the way out `output_proj` is the identity. It writes no token before a
video and uses one fine iteration. Its code builds the backbones by name and loads all weights strictly, so a checkpoint
holds every one of them (`llm.lm_head.weight` too, though it is tied) under the names of transformers up to 5.17.
"""

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, Dinov2Config, LlamaConfig, PretrainedConfig

from fvlm_core.config import LLMSettings, ModelSettings, VisionSettings
from fvlm_core.data.tokenizer import load_tokenizer
from fvlm_core.errors import UserError
from fvlm_core.model.build import (
    WEIGHTS_FILE,
    SavedModel,
    check_vocabulary,
    from_shapes,
    load_model,
    portable_config,
    save_model,
    save_weights,
)
from fvlm_core.model.encoder import Encoder
from fvlm_core.model.foveated import FoveatedVLM

Config = TypeVar("Config", bound=PretrainedConfig)
WEIGHTS_INDEX = f"{WEIGHTS_FILE}.index.json"
"""Of weights in several files: says which parameter is in which."""

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


def convert_to_ours(checkpoint: Path, output: Path, *, vision: str, llm: str, frame_px: int, tokenizer: str | None = None) -> None:
    """Write an original checkpoint (see `read_original`) as a model folder of ours that `load_model` reads, tokenizer included.

    `vision`, `llm`: hub names or folders of the backbones it was built with, of which only the configurations are read.
    `frame_px`: side of the frames. `tokenizer`: by default the language model's. Raises UserError, and writes nothing, where
    something does not fit or `output` exists.
    """
    _refuse_existing(output)
    state = read_original(checkpoint)
    vision_config, llm_config = _backbone(Dinov2Config, vision), _backbone(LlamaConfig, llm)
    tokens = load_tokenizer(tokenizer or llm)
    check_vocabulary(held=llm_config.vocab_size, needed=len(tokens), where=llm)
    settings = ModelSettings(
        vision=VisionSettings(checkpoint=vision, frame_px=frame_px), llm=LLMSettings(checkpoint=llm), fine_iterations=1
    )
    model = from_shapes(
        SavedModel(
            model=settings,
            vocab_size=llm_config.vocab_size,
            vision_config=portable_config(vision_config),
            llm_config=portable_config(llm_config),
        )
    )
    load_original(model, state)
    with TemporaryDirectory(prefix="fvlm-tokenizer-") as folder:
        tokens.save_pretrained(folder)
        save_model(model, output, tokenizer=Path(folder))


def convert_to_original(model_folder: Path, output: Path) -> None:
    """Write a model folder of ours as a safetensors file that the original's code loads.

    Raises UserError, and writes nothing, where the original cannot express the model or `output` exists.
    """
    if output.suffix != ".safetensors":
        raise UserError("the original's checkpoint is a safetensors file", where=str(output), fix="give a name that ends in .safetensors")
    _refuse_existing(output)
    state = to_original(load_model(model_folder))
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.making")
    save_weights(state, temporary)
    temporary.rename(output)


def read_original(checkpoint: Path) -> dict[str, Tensor]:
    """The parameters of an original checkpoint: a safetensors file, the `.pt` of its trainer, or a folder as on the hub.

    Raises UserError where it is missing or cannot be read.
    """
    try:
        files = [checkpoint]
        if checkpoint.is_dir():
            index = checkpoint / WEIGHTS_INDEX
            parts = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {WEIGHTS_FILE}
            files = [checkpoint / part for part in sorted(parts)]
        state = {name: tensor for file in files for name, tensor in _read(file).items()}
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"cannot read the checkpoint: {_first_lines(error)}",
            where=str(checkpoint),
            fix=f"give a safetensors file, a .pt of the original's trainer, or a folder with {WEIGHTS_FILE} or {WEIGHTS_INDEX}",
        ) from error
    return {name.replace("._orig_mod", ""): tensor for name, tensor in state.items()}  # as torch.compile names parameters


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
            f"not a checkpoint of the original fVLM, or of another size: {_first_lines(error)}",
            where="the checkpoint's parameters",
            fix="use the weights of sanps/fVLM-135M or -1.7B with a model of the same DINOv2 and SmolLM2",
        ) from error


def to_original(model: FoveatedVLM) -> dict[str, Tensor]:
    """The original's complete state dict with the model's function; no two tensors share memory.

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
        state[f"encoder.dino.{_old_name(name)}"] = tensor
    state |= {name: tensor for name, tensor in ours.items() if name.startswith("llm.")}
    state["llm.lm_head.weight"] = state["llm.lm_head.weight"].clone()
    return state


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    with file.open("rb") as stream:
        if not is_zipfile(stream):  # the unpickler's errors on anything else are of every kind
            raise ValueError(f"{file.name} is not a file of torch.save")
    state = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(state, dict):
        state = state.get("model_state_dict", state)  # a trainer's file holds the optimizer's state beside it
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{file.name} holds other things than parameters")
    return state


def _backbone(kind: type[Config], name: str) -> Config:
    """The configuration of a backbone."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the configuration of a backbone: {_first_lines(error)}",
            where=name,
            fix="give a hub name that can be reached, or a local folder with its config.json",
        ) from error
    if not isinstance(config, kind):
        raise UserError(
            f"a {config.model_type}, not a {kind.model_type}", where=name, fix="give the backbone that the checkpoint was built with"
        )
    return config


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise UserError("it exists already and is not overwritten", where=str(output), fix="give another place, or remove it first")


def _first_lines(error: Exception) -> str:
    """torch names every parameter that does not fit."""
    return "\n".join(str(error).splitlines()[:3])


def _check(model: FoveatedVLM) -> None:
    settings = model.settings
    odd = settings.tokens_per_frame != 1 or settings.film_head_width or settings.temperature != 1 or settings.glance is not None
    if settings.query != "deep" or odd:
        raise UserError(
            "the original fVLM has deep queries, one token per frame, no FiLM head, temperature 1, and encodes every frame in full",
            where="model settings",
            fix="convert with such a model",
        )


def _old_name(name: str) -> str:
    """A Dinov2Model parameter's name before transformers 5.18."""
    for part, old in (("q", "query"), ("k", "key"), ("v", "value")):
        name = name.replace(f".attention.{part}_proj.", f".attention.attention.{old}.")
    name = name.replace(".attention.o_proj.", ".attention.output.dense.")
    return re.sub(r"^layers?\.(\d+)\.", r"encoder.layer.\1.", name)
