"""A run's output folder: which run it belongs to, and whether that is finished. Does not import torch, for launchers."""

from pathlib import Path

import yaml

from fvlm_core.config import Recipe
from fvlm_core.dotted import differences
from fvlm_core.errors import FolderTakenError, UserError
from fvlm_core.manifest import FILE_NAME, AnyManifest, write_atomically
from fvlm_core.settings import read_yaml
from fvlm_core.train.jobs import IDENTITY_FILE, RECIPE_FILE, RunManifest

PLACES = {"output", "shards", "init_from"}
"""Recipe keys that hold paths."""


def input_digests(recipe: Recipe) -> dict[str, str]:
    """Return the digests of the recipe's inputs, by recipe key. Raises UserError if a manifest is missing."""
    folders = {"shards": recipe.shards} | ({"init_from": recipe.init_from} if recipe.init_from else {})
    backbones = {"vision": recipe.model.vision.checkpoint, "llm": recipe.model.llm.checkpoint}
    # third-party checkpoints have no manifest and are identified by name only
    folders |= {role: Path(name) for role, name in backbones.items() if name and (Path(name) / FILE_NAME).is_file()}
    return {name: AnyManifest.read(folder).digest for name, folder in folders.items()}


def check_folder(recipe: Recipe, identity: str) -> None:
    """Raise FolderTakenError if the recipe's output folder holds another run."""
    path = recipe.output / IDENTITY_FILE
    if not path.is_file():
        return
    if read_yaml(path) == {"identity": identity}:
        return
    raise FolderTakenError(
        f"the folder holds another run: {_difference(recipe)}",
        where=str(recipe.output),
        fix="give this recipe an output folder of its own, or correct these settings to resume that run, or delete its folder",
    )


def claim_folder(recipe: Recipe, identity: str) -> None:
    """Write the recipe and its identity into the output folder. Raises UserError if it is not writable."""
    try:
        recipe.to_yaml(recipe.output / RECIPE_FILE)
        write_atomically(recipe.output / IDENTITY_FILE, yaml.safe_dump({"identity": identity}).encode())
    except OSError as error:
        raise UserError(f"cannot write: {error}", where=str(recipe.output), fix="give an output folder that can be written") from error


def _difference(recipe: Recipe) -> str:
    """Describe the settings that differ from those of the run in the folder."""
    old = read_yaml(recipe.output / RECIPE_FILE) if (recipe.output / RECIPE_FILE).is_file() else {}
    changed = differences(old, recipe.model_dump(mode="json"))
    lines = [f"{path} was {before!r} and is {now!r}" for path, (before, now) in changed.items() if path not in PLACES]
    moved = [f"{path} was {before!r} and is {now!r}" for path, (before, now) in changed.items() if path in PLACES - {"output"}]
    inputs = f"its shards ({recipe.shards}), of init_from or of a backbone's checkpoint"
    return ", ".join(lines or moved) or f"the content of {inputs} has changed since"


def whole_manifest(folder: Path, identity: str) -> RunManifest | None:
    """Return the manifest in `folder` if the run is finished, undamaged and has this identity, otherwise None."""
    manifest = RunManifest.read_whole(folder)
    return manifest if manifest is not None and manifest.settings_hash == identity else None
