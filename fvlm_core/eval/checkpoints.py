"""Open a checkpoint as an `Answerer`: a run or model folder of this package, a checkpoint of the original fVLM, or a SmolVLM2 folder."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fvlm_core.data.frame_sampling import FrameSampling
from fvlm_core.data.tokenizer import chat_format, load_tokenizer
from fvlm_core.errors import UserError
from fvlm_core.eval.answerers.answerer import Answerer
from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
from fvlm_core.eval.jobs import Original
from fvlm_core.eval.subject import Subject
from fvlm_core.manifest import sha256_file
from fvlm_core.model.build import SETTINGS_FILE, WEIGHTS_FILE, load_model
from fvlm_core.settings import read_yaml
from fvlm_core.train.jobs import MODEL_FOLDER, RECIPE_FILE

FORMS = (
    "a run's or model's folder of ours (settings.yaml, model.safetensors), a checkpoint of the original fVLM (with --vision and --llm), "
    "or a SmolVLM2 folder (config.json)"
)
SMOLVLM_TYPES = ("smolvlm",)
ORIGINAL_PX = 224
"""Side of the original fVLM's frames, in pixels."""


def open_checkpoint(
    path: Path, device: torch.device, *, original: Original | None = None, batch_samples: int = 64, seed: int = 0
) -> Answerer:
    """Load a checkpoint of any supported form.

    Raises UserError if the form is not supported, or if `original` is given for a checkpoint that is not of the original fVLM.
    """
    folder = path / MODEL_FOLDER if (path / MODEL_FOLDER / SETTINGS_FILE).is_file() else path
    original = original or Original()
    if (folder / SETTINGS_FILE).is_file():
        check_no_original_options(path, original)
        return _ours(folder, path, device, batch_samples, seed)
    if not path.exists():
        raise UserError("there is no checkpoint", where=str(path), fix=f"give {FORMS}")
    kind = _model_type(path)
    if kind in SMOLVLM_TYPES:
        check_no_original_options(path, original)
        from fvlm_core.eval.answerers.smolvlm import SmolVLMAnswerer

        return SmolVLMAnswerer.load(path, device, seed=seed)
    if kind:
        raise UserError(f"a checkpoint of another architecture: {kind}", where=str(path / "config.json"), fix=f"give {FORMS}")
    return _original(path, device, original, batch_samples, seed)


def check_no_original_options(path: Path, original: Original) -> None:
    """Raise UserError if `original` sets options for a checkpoint that stores these properties itself."""
    if given := [f"--{name.replace('_', '-')}" for name, value in original if value is not None]:
        fix = f"leave out {', '.join(given)}: for checkpoints of the original fVLM only"
        raise UserError("this model says itself what it was built with", where=str(path), fix=fix)


def _ours(folder: Path, run: Path, device: torch.device, batch_samples: int, seed: int) -> FoveatedAnswerer:
    model = load_model(folder).eval().requires_grad_(False)
    tokenizer = load_tokenizer(folder)
    shown = FrameSampling.of_model(folder, model.settings.vision.frame_px)
    # plain YAML, not validated: a model can be used even if its recipe was written for another version of the code
    recipe = read_yaml(run / RECIPE_FILE) if (run / RECIPE_FILE).is_file() else {}
    subject = Subject(model.to(device), tokenizer, chat_format(tokenizer), device, batch_samples)
    return FoveatedAnswerer(
        subject,
        name=recipe.get("name", run.name),
        checkpoint=sha256_file(folder / WEIGHTS_FILE),
        rule=shown.rule,
        image_repeats=shown.image_repeats,
        seed=seed,
    )


def _original(path: Path, device: torch.device, original: Original, batch_samples: int, seed: int) -> FoveatedAnswerer:
    from fvlm_core.model.convert import convert_to_ours

    if original.vision is None or original.llm is None:
        raise UserError(
            "not a model of ours; a checkpoint of the original fVLM does not say what it was built with",
            where=str(path),
            fix=f"give --vision and --llm for that, or {FORMS}",
        )
    with TemporaryDirectory(prefix="fvlm-original-") as place:
        converted = Path(place) / path.stem
        convert_to_ours(path, converted, vision=original.vision, llm=original.llm, frame_px=original.frame_px or ORIGINAL_PX)
        return _ours(converted, converted, device, batch_samples, seed)


def _model_type(path: Path) -> str:
    """The `model_type` in a transformers folder's config.json; empty if there is no such file."""
    try:
        return str(json.loads((path / "config.json").read_text()).get("model_type", "unknown"))
    except (OSError, ValueError):
        return ""
