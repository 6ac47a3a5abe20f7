"""Load a model for inference: a released folder, the folder of a training run or its model, a checkpoint of the original fVLM, or the name
of a repository on the hub."""

import json
import re
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from yaml import YAMLError

from fvlm_core.data.frame_sampling import FrameSampling
from fvlm_core.data.tokenizer import chat_format, load_tokenizer
from fvlm_core.devices import device_of
from fvlm_core.errors import UserError
from fvlm_core.eval.answerers.answerer import Answerer
from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
from fvlm_core.eval.checkpoints import check_no_original_options, open_checkpoint
from fvlm_core.eval.jobs import Original
from fvlm_core.eval.subject import Subject
from fvlm_core.manifest import sha256_file
from fvlm_core.model.build import WEIGHTS_FILE
from fvlm_core.model.convert import WEIGHTS_INDEX, read_original
from fvlm_core.model.encoder import Encoder
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.llama import Llama
from fvlm_core.model.names import SHORT_MODES, Mode
from fvlm_core.release.hub.configuration_fvlm import FVLMConfig
from fvlm_core.release.names import WEIGHTS_PREFIX

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
CONFIG_FILE, PROCESSOR_FILE, CARD_FILE = "config.json", "processor_config.json", "README.md"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
FORMS = "give a released folder, a run's or model's folder, a checkpoint of the original fVLM (with --vision and --llm), or a hub name"


def load(model: str | Path, device: str | torch.device = "auto", *, original: Original | None = None) -> FoveatedAnswerer:
    """Load the model, tokenizer and frame rule of a folder, file or hub name, in eval mode on a device (`auto`: a GPU if there is one).

    Raises UserError if there is no such model, or it is not an fVLM.
    """
    loaded = open_model(model, device_of(device, where="--device"), original=original)
    if not isinstance(loaded, FoveatedAnswerer):
        raise UserError("this is a baseline's checkpoint, which can only be evaluated", where=str(model), fix=FORMS)
    return loaded


def open_model(
    model: str | Path, device: torch.device, *, original: Original | None = None, batch_samples: int = 64, seed: int = 0
) -> Answerer:
    """Like `open_checkpoint`, but also accepts a released folder or a hub name."""
    path, name = Path(model), ""
    if not path.exists() and REPOSITORY.fullmatch(str(model)):
        path, name = _download(str(model)), str(model)
    if not path.exists():
        raise UserError("there is no such model", where=str(model), fix=FORMS)
    if not _is_released(path):
        return open_checkpoint(path, device, original=original, batch_samples=batch_samples, seed=seed)
    check_no_original_options(path, original or Original())
    return _released(path, device, name or _name(path), batch_samples, seed)


def default_mode(answerer: FoveatedAnswerer) -> Mode:
    """`coarse_fine`, or `coarse_only` for a model without queries."""
    return "coarse_fine" if answerer.subject.gazes else "coarse_only"


def checked_mode(answerer: FoveatedAnswerer, name: str | None) -> Mode:
    """The mode of that name (`coarse` and `fine` are short names), or the default. Raises UserError if the model does not have it."""
    mode = default_mode(answerer) if name is None else SHORT_MODES.get(name, name)
    for known in answerer.subject.model.modes:
        if mode == known:
            return known
    raise UserError(f"the model has no mode {name!r}", where="mode", fix=f"use one of {', '.join(answerer.subject.model.modes)}")


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"neither a folder nor a repository that can be fetched: {reason}", where=name, fix=FORMS) from error


def _is_released(path: Path) -> bool:
    try:
        return json.loads((path / CONFIG_FILE).read_text()).get("model_type") == FVLMConfig.model_type
    except (OSError, ValueError, AttributeError):
        return False


def _name(folder: Path) -> str:
    """The model's name on a released folder's card; without a card, the folder's name."""
    try:
        return getattr(ModelCard.load(folder / CARD_FILE).data, "model_name", None) or folder.resolve().name
    except (OSError, ValueError, YAMLError):
        return folder.resolve().name


def _released(folder: Path, device: torch.device, name: str, batch_samples: int, seed: int) -> FoveatedAnswerer:
    """Load a released folder's weights into this package's modules; none of the folder's code is run."""
    fix = "get a complete copy of the folder"
    try:
        config = FVLMConfig.from_pretrained(folder)
        settings: Any = config.model_settings
        model = FoveatedVLM(settings, Encoder(config.vision_config), Llama(config.text_config))
        values = json.loads((folder / PROCESSOR_FILE).read_text())
        shown = FrameSampling.model_validate({name: values[name] for name in FrameSampling.model_fields if name in values})
        state = {name.removeprefix(WEIGHTS_PREFIX): tensor.float() for name, tensor in read_original(folder).items()}
        if config.text_config.tie_word_embeddings:
            state["llm.lm_head.weight"] = state["llm.model.embed_tokens.weight"]
        model.load_state_dict(state)
    except UserError as error:
        raise UserError(error.what, where=str(folder), fix=fix) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the released model does not load: {reason}", where=str(folder), fix=fix) from error
    with TemporaryDirectory(prefix="fvlm-tokenizer-") as place:  # next to config.json, transformers would ask whether to run its code
        for file in TOKENIZER_FILES:
            if (folder / file).is_file():
                copyfile(folder / file, Path(place) / file)
        tokenizer = load_tokenizer(place)
    index = folder / WEIGHTS_INDEX
    return FoveatedAnswerer(
        Subject(model.eval().requires_grad_(False).to(device), tokenizer, chat_format(tokenizer), device, batch_samples),
        name=name,
        checkpoint=sha256_file(index if index.is_file() else folder / WEIGHTS_FILE),
        rule=shown.rule,
        image_repeats=shown.image_repeats,
        seed=seed,
    )
