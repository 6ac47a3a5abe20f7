"""How a model is made, loaded and saved: from checkpoints, from shapes with random weights, or from a folder of our own.

A saved model is a folder of `settings.yaml`, `model.safetensors` and, where it is to be used with text, the tokenizer's files.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Dinov2Config, LlamaConfig, PretrainedConfig

from fvlm_core.config import LLMSettings, ModelSettings, VisionSettings
from fvlm_core.errors import UserError
from fvlm_core.model.encoder import Encoder
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.llama import Llama
from fvlm_core.settings import Settings

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SETTINGS_FILE, WEIGHTS_FILE = "settings.yaml", "model.safetensors"
READABLE = 0o644
"""Mode of files of weights."""


class SavedModel(Settings):
    """What `settings.yaml` of a saved model holds: shapes only, so that loading needs no hub."""

    model: ModelSettings
    vocab_size: int
    vision_config: dict
    """transformers' Dinov2Config values."""
    llm_config: dict
    """transformers' LlamaConfig values."""


def build_model(settings: ModelSettings, *, vocab_size: int, seed: int = 0) -> FoveatedVLM:
    """Build the model in fp32: backbones from checkpoints or shapes, the connector at random from `seed`.

    Raises UserError where a checkpoint cannot be loaded, or the tokenizer's vocabulary is larger than the LLM's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FoveatedVLM(settings, build_encoder(settings.vision), _build_llm(settings.llm, vocab_size))


def load_model(folder: Path) -> FoveatedVLM:
    """Load what `save_model` wrote. Raises UserError where it is missing or does not fit."""
    model = from_shapes(SavedModel.from_yaml(folder / SETTINGS_FILE))
    try:
        state = load_file(folder / WEIGHTS_FILE)
        if model.llm.config.tie_word_embeddings:
            state["llm.lm_head.weight"] = state["llm.model.embed_tokens.weight"]
        model.load_state_dict(state)
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"the weights do not load: {error}", where=str(folder / WEIGHTS_FILE), fix="make the model again") from error
    return model


def from_shapes(saved: SavedModel) -> FoveatedVLM:
    """A model of these shapes in fp32, for weights to be loaded into."""
    return FoveatedVLM(saved.model, Encoder(Dinov2Config(**saved.vision_config)), Llama(LlamaConfig(**saved.llm_config)))


def save_model(model: FoveatedVLM, folder: Path, *, tokenizer: Path | None = None, weights: dict[str, Tensor] | None = None) -> None:
    """Write a model (tied weights once) and the tokenizer's files into one folder, which is there complete or not at all.

    `tokenizer`: a folder of its files. `weights`: those of `FoveatedVLM.weights`, for a model that does not hold them itself
    (sharded over ranks).
    """
    temporary = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    saved = SavedModel(
        model=model.settings.portable(),
        vocab_size=model.llm.config.vocab_size,
        vision_config=portable_config(model.encoder.config),
        llm_config=portable_config(model.llm.config),
    )
    saved.to_yaml(temporary / SETTINGS_FILE)
    save_weights(model.weights() if weights is None else weights, temporary / WEIGHTS_FILE)
    for path in sorted(tokenizer.iterdir()) if tokenizer else ():
        shutil.copyfile(path, temporary / path.name)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that others may read too, which safetensors gives to its owner alone."""
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(READABLE)


def portable_config(config: PretrainedConfig) -> dict:
    """What a transformers configuration changes of its defaults, without what depends on the installation."""
    left_out = ("transformers_version", "_name_or_path", "architectures", "dtype")
    return {key: value for key, value in config.to_diff_dict().items() if key not in left_out}


def build_encoder(settings: VisionSettings) -> Encoder:
    """The vision encoder from its checkpoint or shape. Raises UserError where a checkpoint cannot be loaded."""
    from transformers import Dinov2Model  # seconds, which a model that is only loaded and run does not need

    if settings.checkpoint is not None:
        return Encoder.from_dinov2(_from_checkpoint(Dinov2Model, settings.checkpoint))
    shape = settings.shape
    assert shape is not None
    config = Dinov2Config(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        patch_size=shape.patch_px,
        image_size=settings.frame_px,
        layerscale_value=shape.layerscale,
        initializer_range=init_std(shape.width),
    )
    return Encoder.from_dinov2(Dinov2Model(config))


def check_vocabulary(*, held: int, needed: int, where: str) -> None:
    """Raise UserError if a tokenizer needs more tokens than the language model at `where` holds."""
    if held < needed:
        raise UserError(
            f"the tokenizer has {needed} tokens, the language model only {held}",
            where=where,
            fix="use the tokenizer that belongs to the checkpoint",
        )


def _build_llm(settings: LLMSettings, vocab_size: int) -> Llama:
    from transformers import LlamaForCausalLM  # as above

    if settings.checkpoint is not None:
        theirs = _from_checkpoint(LlamaForCausalLM, settings.checkpoint)
        check_vocabulary(held=theirs.config.vocab_size, needed=vocab_size, where=settings.checkpoint)
        if settings.layers is not None:
            _keep_layers(theirs, settings.layers, where=settings.checkpoint)
        try:
            return Llama.from_transformers(theirs)
        except ValueError as error:
            raise UserError(
                f"cannot run {settings.checkpoint!r}: {error}", where="model.llm.checkpoint", fix="give a checkpoint such as SmolLM2's"
            ) from error
    shape = settings.shape
    assert shape is not None
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.mlp_width,
        max_position_embeddings=shape.context,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        initializer_range=init_std(shape.width),
    )
    return Llama.from_transformers(LlamaForCausalLM(config))


def _keep_layers(model: "LlamaForCausalLM", layers: int, *, where: str) -> None:
    """Drop all layers after the first so many."""
    if layers > (held := len(model.model.layers)):
        raise UserError(f"{layers} layers are to be kept of {held}", where=where, fix=f"give model.llm.layers up to {held}")
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers


def init_std(width: int) -> float:
    """Keeps a product with a unit-variance input at unit variance: the fixed 0.02 that large models use leaves attention
    flat and gradients tiny at the small widths that shapes are for."""
    return width**-0.5


def _from_checkpoint(cls: Any, checkpoint: str):
    """`cls.from_pretrained` in fp32, complete or not at all."""
    try:
        model, report = cls.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"cannot load {cls.__name__} from {checkpoint!r}: {str(error).splitlines()[0]}",
            where="model.vision.checkpoint or model.llm.checkpoint",
            fix="give a hub name that can be reached or a local folder, or a shape for random weights",
        ) from error
    if missing := sorted(set(report["missing_keys"]) - {"lm_head.weight", "embeddings.mask_token"}):
        raise UserError(
            f"{checkpoint!r} lacks {len(missing)} weights of {cls.__name__}, e.g. {missing[0]}",
            where="model.vision.checkpoint or model.llm.checkpoint",
            fix="give a checkpoint of that architecture; missing weights are never filled in at random",
        )
    return model
