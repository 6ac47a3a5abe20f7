"""Convert checkpoints of the original fVLM (`sanps/fVLM-135M`, `-1.7B`) to this repository's format and back, with equal outputs.

The original applies two linear layers after the query (`encoder.output_proj`, then `dino_to_llm`) and multiplies the result by 0.14. This
repository has one layer: the import multiplies the three together, and the export writes the identity as `output_proj`. The original puts
no token before a video and uses one fine iteration. Its code builds the backbones by name and loads weights strictly, so a checkpoint
contains all of them (including the tied `llm.lm_head.weight`) under the parameter names of transformers up to 5.17.
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
"""Index of a checkpoint in several files: maps parameters to files."""

VISUAL_SCALE = 0.14
"""The original multiplies visual tokens by this factor."""
_SHARED = {
    "query_input_proj.weight": "encoder.query_input_proj.weight",
    "query_head.weight": "llm_to_query.weight",
    "query_head.bias": "llm_to_query.bias",
    "q_static": "q_static",
    "q_init": "q_init",
}
"""Connector parameters that only differ in name: ours to the original's."""


def convert_to_ours(checkpoint: Path, output: Path, *, vision: str, llm: str, frame_px: int, tokenizer: str | None = None) -> None:
    """Convert an original checkpoint (see `read_original`) to a model folder for `load_model`, including the tokenizer.

    `vision`, `llm`: hub names or folders of the checkpoint's backbones; only their configurations are read. `frame_px`: side of a frame.
    `tokenizer`: hub name or folder; default: the one of `llm`. Raises UserError, and writes nothing, if the checkpoint does not match the
    backbones or `output` exists.
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
    """Convert a model folder to a safetensors file that the original fVLM code can load.

    Raises UserError, and writes nothing, if the original does not support the model or `output` exists.
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
    """Read the parameters of an original checkpoint: a safetensors file, a `.pt` file of its trainer, or a folder as on the hub.

    Raises UserError if it is missing or cannot be read.
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
    return {name.replace("._orig_mod", ""): tensor for name, tensor in state.items()}  # torch.compile adds this prefix


def load_original(model: FoveatedVLM, state: Mapping[str, Tensor]) -> None:
    """Load the original's weights (converted to fp32) into a model with deep queries, one token per frame and the same sizes.

    Raises UserError if the original does not support the model, or if weights are missing or have other shapes.
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
    """Return the state dict of the equivalent original model. No two tensors share memory.

    Raises UserError if the original does not support the model.
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
        if not is_zipfile(stream):  # on other files the unpickler may raise any exception
            raise ValueError(f"{file.name} is not a file of torch.save")
    state = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(state, dict):
        state = state.get("model_state_dict", state)  # a trainer's checkpoint also holds the optimizer state
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{file.name} holds something other than parameters")
    return state


def _backbone(kind: type[Config], name: str) -> Config:
    """Load a backbone's configuration. Raises UserError if it cannot be loaded or is of another architecture."""
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
        raise UserError("it exists already and is not overwritten", where=str(output), fix="give another path, or remove it first")


def _first_lines(error: Exception) -> str:
    """Return the first lines of a message: torch lists every mismatched parameter."""
    return "\n".join(str(error).splitlines()[:3])


def _check(model: FoveatedVLM) -> None:
    settings = model.settings
    odd = settings.tokens_per_frame != 1 or settings.film_head_width or settings.temperature != 1 or settings.glance is not None
    if settings.query != "deep" or odd:
        raise UserError(
            "the original fVLM has deep queries, one token per frame, no FiLM head, temperature 1, and encodes every frame in full",
            where="model settings",
            fix="convert a model with these settings",
        )


def _old_name(name: str) -> str:
    """Return the name of a `Dinov2Model` parameter before transformers 5.18."""
    for part, old in (("q", "query"), ("k", "key"), ("v", "value")):
        name = name.replace(f".attention.{part}_proj.", f".attention.attention.{old}.")
    name = name.replace(".attention.o_proj.", ".attention.output.dense.")
    return re.sub(r"^layers?\.(\d+)\.", r"encoder.layer.\1.", name)
