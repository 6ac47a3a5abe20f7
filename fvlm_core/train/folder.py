"""A run's folder: whose it is, and whether the run in it is finished. No torch here: launchers read it too."""

from pathlib import Path

import yaml

from fvlm_core.config import Recipe
from fvlm_core.dotted import differences
from fvlm_core.errors import UserError
from fvlm_core.manifest import FILE_NAME, AnyManifest, write_atomically
from fvlm_core.settings import read_yaml
from fvlm_core.train.jobs import IDENTITY_FILE, RECIPE_FILE, RunManifest

PLACES = {"output", "shards", "init_from"}
"""Keys of a recipe that say where things are."""


def input_digests(recipe: Recipe) -> dict[str, str]:
    """Digests of what the recipe's paths point at. Raises UserError where a manifest is missing."""
    folders = {"shards": recipe.shards} | ({"init_from": recipe.init_from} if recipe.init_from else {})
    backbones = {"vision": recipe.model.vision.checkpoint, "llm": recipe.model.llm.checkpoint}
    # a checkpoint of someone else has no manifest: its name has to do
    folders |= {role: Path(name) for role, name in backbones.items() if name and (Path(name) / FILE_NAME).is_file()}
    return {name: AnyManifest.read(folder).digest for name, folder in folders.items()}


def check_folder(recipe: Recipe, identity: str) -> None:
    """Raises UserError when the recipe's output folder holds another run."""
    path = recipe.output / IDENTITY_FILE
    if not path.is_file():
        return
    if read_yaml(path) == {"identity": identity}:
        return
    raise UserError(
        f"the folder holds another run: {_difference(recipe)}",
        where=str(recipe.output),
        fix="give this recipe an output folder of its own, or delete that one",
    )


def claim_folder(recipe: Recipe, identity: str) -> None:
    """Write the recipe and its identity into the output folder. Raises UserError where that cannot be written."""
    try:
        recipe.to_yaml(recipe.output / RECIPE_FILE)
        write_atomically(recipe.output / IDENTITY_FILE, yaml.safe_dump({"identity": identity}).encode())
    except OSError as error:
        raise UserError(f"cannot write: {error}", where=str(recipe.output), fix="give an output folder that can be written") from error


def _difference(recipe: Recipe) -> str:
    """Which settings differ from those the folder was made with."""
    old = read_yaml(recipe.output / RECIPE_FILE) if (recipe.output / RECIPE_FILE).is_file() else {}
    changed = differences(old, recipe.model_dump(mode="json"))
    lines = [f"{path} was {before!r} and is {now!r}" for path, (before, now) in changed.items() if path not in PLACES]
    return ", ".join(lines) or "its shards or init_from differ"


def whole_manifest(folder: Path, identity: str) -> RunManifest | None:
    """The manifest of a run that is finished, undamaged and this very one, else None."""
    manifest = RunManifest.read_whole(folder)
    return manifest if manifest is not None and manifest.settings_hash == identity else None
