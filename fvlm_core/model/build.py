"""Build, load and save models: from Hugging Face checkpoints, from shapes with random weights, or from a saved model folder.

A saved model is a folder with `settings.yaml`, `model.safetensors` and, optionally, the tokenizer files.
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
"""File mode of weight files."""


class SavedModel(Settings):
    """Contents of a saved model's `settings.yaml`. It holds complete configurations, so that loading needs no access to the hub."""

    model: ModelSettings
    vocab_size: int
    vision_config: dict
    """Values of transformers' `Dinov2Config`."""
    llm_config: dict
    """Values of transformers' `LlamaConfig`."""


def build_model(settings: ModelSettings, *, vocab_size: int, seed: int = 0) -> FoveatedVLM:
    """Build a model in fp32. Backbones come from checkpoints or shapes; the connector is initialised at random from `seed`.

    Raises UserError if a checkpoint cannot be loaded, or if the language model has fewer than `vocab_size` tokens.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FoveatedVLM(settings, build_encoder(settings.vision), _build_llm(settings.llm, vocab_size))


def load_model(folder: Path) -> FoveatedVLM:
    """Load a model folder written by `save_model`. Raises UserError if files are missing or the weights do not match the settings."""
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
    """Build an fp32 model from saved configurations, ready to load weights into."""
    return FoveatedVLM(saved.model, Encoder(Dinov2Config(**saved.vision_config)), Llama(LlamaConfig(**saved.llm_config)))


def save_model(model: FoveatedVLM, folder: Path, *, tokenizer: Path | None = None, weights: dict[str, Tensor] | None = None) -> None:
    """Write a model and the tokenizer files into `folder`, atomically. Tied weights are stored once.

    `tokenizer`: folder with the tokenizer files. `weights`: output of `FoveatedVLM.weights`; required if the model is sharded over ranks.
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
    """Write a safetensors file that all users can read; safetensors creates files readable by their owner only."""
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(READABLE)


def portable_config(config: PretrainedConfig) -> dict:
    """Return the non-default values of a transformers configuration, without those that depend on the installation."""
    left_out = ("transformers_version", "_name_or_path", "architectures", "dtype")
    return {key: value for key, value in config.to_diff_dict().items() if key not in left_out}


def build_encoder(settings: VisionSettings) -> Encoder:
    """Build the vision encoder from its checkpoint or shape. Raises UserError if a checkpoint cannot be loaded."""
    from transformers import Dinov2Model  # this import takes seconds, and loading a saved model does not need it

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
    """Raise UserError if the tokenizer has more tokens (`needed`) than the language model (`held`)."""
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
    """Keep only the first `layers` layers."""
    if layers > (held := len(model.model.layers)):
        raise UserError(f"cannot keep {layers} of {held} layers", where=where, fix=f"give model.llm.layers up to {held}")
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers


def init_std(width: int) -> float:
    """Return the initialisation std that maps unit-variance inputs to unit-variance outputs.

    Large models use a fixed 0.02, which gives flat attention and tiny gradients at the small widths that shapes are meant for.
    """
    return width**-0.5


def _from_checkpoint(cls: Any, checkpoint: str):
    """`cls.from_pretrained` in fp32. Raises UserError if it fails or weights are missing."""
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
