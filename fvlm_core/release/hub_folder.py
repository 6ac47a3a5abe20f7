"""Write the released folder: code, configuration, weights, tokenizer and processor, as transformers and the hub expect them."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from transformers import AutoTokenizer, GenerationConfig

from fvlm_core import __version__
from fvlm_core.config import Recipe
from fvlm_core.data.jobs import ShardManifest
from fvlm_core.data.tokenizer import TURN_END
from fvlm_core.manifest import write_atomically
from fvlm_core.model.build import READABLE
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.release.hub.configuration_fvlm import FVLMConfig
from fvlm_core.release.hub.processing_fvlm import FVLMProcessor
from fvlm_core.release.names import WEIGHTS_PREFIX
from fvlm_core.release.standalone import export

MODEL_CLASS = "modeling_fvlm.FVLMModel"
AUTO_MAP = {"AutoConfig": "configuration_fvlm.FVLMConfig", "AutoModel": MODEL_CLASS, "AutoModelForImageTextToText": MODEL_CLASS}
PROCESSOR_MAP = {"AutoProcessor": "processing_fvlm.FVLMProcessor"}
MAX_SHARD = "5GB"
"""Largest size of a weights file."""
MAX_NEW_TOKENS = 64
"""Default length of an answer, in `generation_config.json`."""


def write_hub_folder(
    folder: Path, model: FoveatedVLM, tokenizer: Path, recipe: Recipe, shards: ShardManifest, *, max_shard: str = MAX_SHARD
) -> None:
    """Write everything except the card into `folder`, with weights files of at most `max_shard`."""
    folder.mkdir(parents=True, exist_ok=True)
    export(folder, __version__)
    weights = {f"{WEIGHTS_PREFIX}{name}": tensor for name, tensor in model.weights().items()}
    save_torch_state_dict(weights, str(folder), max_shard_size=max_shard)
    for file in folder.glob("*.safetensors"):
        file.chmod(READABLE)
    tokens: Any = AutoTokenizer.from_pretrained(str(tokenizer))
    FVLMProcessor(
        tokens,
        frame_px=shards.frame_px,
        fps=shards.fps,
        max_frames=shards.max_frames,
        image_repeats=recipe.data.image_repeats,
        tokens_per_frame=model.settings.tokens_per_frame,
    ).save_pretrained(folder)
    _add(folder / "processor_config.json", {"auto_map": PROCESSOR_MAP})
    end = tokens.convert_tokens_to_ids(TURN_END)
    GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=end).save_pretrained(folder)
    configuration(model, recipe).save_pretrained(folder)
    _add(folder / "config.json", {"architectures": [MODEL_CLASS.rsplit(".", 1)[1]], "auto_map": AUTO_MAP})


def configuration(model: FoveatedVLM, recipe: Recipe) -> FVLMConfig:
    """The model's complete configuration; the code on the hub cannot read this project's recipes."""
    settings = model.settings
    return FVLMConfig(
        vision_config=model.encoder.config.to_diff_dict(),
        text_config=model.llm.config.to_diff_dict(),
        query=settings.query,
        tokens_per_frame=settings.tokens_per_frame,
        fine_iterations=settings.fine_iterations,
        query_temperature=settings.temperature,
        visual_scale=settings.visual_scale,
        film_head_width=settings.film_head_width,
        glance=None if settings.glance is None else settings.glance.model_dump(),
        loss_weights=[recipe.loss.coarse, *recipe.loss.fine],
        default_mode="coarse_fine" if "coarse_fine" in model.modes else "coarse_only",
        dtype="float32",
    )


def _add(path: Path, values: dict[str, Any]) -> None:
    """Add keys to a JSON file."""
    write_atomically(path, (json.dumps(json.loads(path.read_text()) | values, indent=2, sort_keys=True) + "\n").encode())
