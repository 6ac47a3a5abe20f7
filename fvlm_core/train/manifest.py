"""What a run leaves behind, and whose folder it is. No torch here: launchers and reports read it too."""

from pathlib import Path

import yaml
from pydantic import ConfigDict, Field

from fvlm_core.config import Recipe
from fvlm_core.errors import UserError
from fvlm_core.manifest import FILE_NAME, Manifest, write_atomically
from fvlm_core.settings import Settings, read_yaml

IDENTITY_FILE = "identity.yaml"
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.csv"
MODEL_FOLDER = "model"
CHECKPOINTS_FOLDER = "checkpoints"
REFERENCE_FOLDER = "reference"


class Divergence(Settings):
    """One time that training diverged, and what was done."""

    step: int
    """Optimizer steps done when it was noticed."""
    reason: str
    back_to: int
    """Step of the checkpoint that training went back to; 0 is the start."""
    froze: str
    """What is frozen from then on: `vision`, then `llm_lower` (the lower half of the language model's layers)."""


class RunManifest(Manifest):
    """A finished training run."""

    steps: int
    final_loss: float
    """Validation loss of the last pass, of the model in `model/`."""
    losses: dict[str, float]
    """Validation loss of each pass that has a weight: cross-entropy per labelled token, or the DPO loss per pair."""
    best_step: int
    """Step of the kept checkpoint with the lowest score (the recipe's `best`)."""
    best_loss: float
    """Its score; by default its validation loss of the last pass."""
    samples_seen: int
    frames_seen: int
    """Shown frames."""
    label_tokens_seen: int
    flops: float
    """Of all training steps, from the configuration."""
    params: int
    resumed_from: list[int] = Field(default_factory=list)
    """The steps of the checkpoints that the run was continued from."""
    skipped_steps: int = 0
    """Steps without an update because the loss or a gradient was not finite."""
    divergences: list[Divergence] = Field(default_factory=list)


class AnyManifest(Manifest):
    """Any step's manifest, for its digest."""

    model_config = ConfigDict(extra="ignore")


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
    before, now = _flat(old), _flat(recipe.model_dump(mode="json"))
    paths = {"output", "shards", "init_from"}
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key) and key not in paths)
    return ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed) or "its shards or init_from differ"


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    """Nested dicts and lists as one dict with dotted keys."""
    if isinstance(value, (dict, list)) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, part in items for path, leaf in _flat(part, f"{prefix}.{key}" if prefix else str(key)).items()}
    return {prefix: value}


def whole_manifest(folder: Path, identity: str) -> RunManifest | None:
    """The manifest of a run that is finished, undamaged and this very one, else None."""
    manifest = RunManifest.read_whole(folder)
    return manifest if manifest is not None and manifest.settings_hash == identity else None
