"""Check, before anything starts, that the checkpoints and tokenizers named in a profile exist and fit."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from fvlm_core.errors import UserError
from tasks.config import PipelineConfig

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
HUB_TIMEOUT_S = 10
LOOKS = 8
"""Names that are looked up at the same time."""
VISION, LLM = "model.vision.checkpoint", "model.llm.checkpoint"


class Named(NamedTuple):
    """A checkpoint or tokenizer named in a profile."""

    where: str
    """Dotted path of the setting."""
    name: str
    tokenizer: bool = False

    @property
    def any_of(self) -> tuple[tuple[str, ...], ...]:
        """Required files: at least one of each group."""
        return (TOKENIZER,) if self.tokenizer else ((CONFIG,), WEIGHTS)


def check_pretrained(config: PipelineConfig) -> None:
    """Raise UserError unless every tokenizer and backbone is a complete local folder, cached, or reachable, and patches divide frames."""
    named = list(_named(config))
    with ThreadPoolExecutor(LOOKS) as pool:
        list(pool.map(_check, {one.name: one for one in named}.values()))
    for one in named:
        if one.where.endswith("vision.checkpoint"):
            _check_patch(one, config.model.vision.frame_px)


def _named(config: PipelineConfig) -> Iterator[Named]:
    found = [
        (VISION, config.model.vision.checkpoint),
        (LLM, config.model.llm.checkpoint),
        *((f"scaling.sizes, {size.name}: llm.checkpoint", size.llm.checkpoint) for size in config.scaling.sizes),
        *((f"ablations, {one.name}: {one.path}", one.value) for one in config.ablations if one.path in (VISION, LLM)),
    ]
    yield from (Named(where, name) for where, name in found if isinstance(name, str))
    if config.precompute.shards.tokenizer is not None:
        yield Named("precompute.shards.tokenizer", config.precompute.shards.tokenizer, tokenizer=True)


def _check(named: Named) -> None:
    folder = Path(named.name)
    if folder.is_dir():
        missing = [" or ".join(group) for group in named.any_of if not any((folder / name).is_file() for name in group)]
        if missing:
            raise UserError(f"{folder} lacks {' and '.join(missing)}", where=named.where, fix="give the folder of a complete checkpoint")
        return
    if folder.is_absolute():
        raise UserError(f"there is no folder {folder}", where=named.where, fix="correct the path")
    try:
        if all(any(_cached(named.name, name) for name in group) for group in named.any_of):
            return
        get_hf_file_metadata(hf_hub_url(named.name, TOKENIZER[1] if named.tokenizer else CONFIG), timeout=HUB_TIMEOUT_S)
    except HFValidationError as error:
        raise UserError(
            f"neither a folder nor a name on the hub: {named.name!r}", where=named.where, fix="give OWNER/NAME, or an existing folder"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(
            f"the hub does not give {named.name!r}: {str(error).splitlines()[0]}",
            where=named.where,
            fix="correct the name; for a gated model, set HF_TOKEN",
        ) from error
    except (httpx.HTTPError, OSError) as error:
        raise UserError(
            f"{named.name!r} is not in the local cache, and the hub cannot be reached: {error or type(error).__name__}",
            where=named.where,
            fix="check the network, or give a local folder",
        ) from error


def _cached(name: str, file: str) -> str | None:
    """Path of the file in the local cache."""
    found = try_to_load_from_cache(name, file)
    return found if isinstance(found, str) else None


def _check_patch(named: Named, frame_px: int) -> None:
    """Check that the frame size is a multiple of the patch size, if the checkpoint's configuration is available locally."""
    local = Path(named.name) / CONFIG
    path = str(local) if local.is_file() else _cached(named.name, CONFIG)
    if path is None:
        return
    patch = json.loads(Path(path).read_text()).get("patch_size")
    if isinstance(patch, int) and frame_px % patch:
        raise UserError(
            f"frames of {frame_px} px are not a multiple of {named.name}'s patch of {patch} px",
            where="model.vision.frame_px",
            fix=f"use a multiple, e.g. {max(patch, round(frame_px / patch) * patch)}",
        )
