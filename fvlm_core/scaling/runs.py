"""Read finished training runs for comparisons."""

import csv
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fvlm_core.config import Recipe
from fvlm_core.dotted import flatten
from fvlm_core.errors import UserError
from fvlm_core.train.jobs import METRICS_FILE, RECIPE_FILE, RunManifest

NOT_SCIENCE = ("name", "phase", "output", "shards", "init_from")
"""Recipe keys with names and paths, which are not compared between runs as written. The initial weights (`init_from`) are compared by the
digest of the run that they come from, because the same run may lie in another folder."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run with its manifest and recipe."""

    folder: Path
    manifest: RunManifest
    recipe: Recipe

    @classmethod
    def read(cls, folder: Path) -> "FinishedRun":
        """Read a run's folder. Raises UserError if the run has not finished."""
        return cls(folder, RunManifest.read(folder), Recipe.from_yaml(folder / RECIPE_FILE))

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's settings without names and paths, by dotted path, and the digest of the run it started from (None: from no run)."""
        settings = flatten(self.recipe.model_dump(mode="json", exclude=set(NOT_SCIENCE)))
        return settings | {"init_from": self.manifest.inputs.get("init_from")}

    @property
    def validated_on(self) -> dict[str, Any]:
        """The settings that determine the validation samples, given the shards."""
        samples = self.recipe.data.held_out.model_dump(include={"mixture", "question_first", "loss_on", "image_repeats"})
        return samples | {"eval_samples": self.recipe.run.eval_samples}

    def frames_per_s(self) -> float | None:
        """Median over the evaluation points in `metrics.csv`; None if it was not logged."""
        values = [float(row["frames_per_s"]) for row in metrics_rows(self.folder) if row.get("frames_per_s")]
        return median(values) if values else None


def metrics_rows(folder: Path) -> list[dict[str, str]]:
    """Rows of a run's `metrics.csv`; empty if there is no such file."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def differences(run: FinishedRun, baseline: FinishedRun) -> list[str]:
    """Dotted paths of the settings in which two runs differ."""
    ours, theirs = run.settings, baseline.settings
    missing = object()
    return sorted(path for path in ours.keys() | theirs.keys() if ours.get(path, missing) != theirs.get(path, missing))


def same_shards(runs: dict[str, FinishedRun]) -> None:
    """Raise UserError if the runs used different shards, because then their losses cannot be compared."""
    digests = {name: run.manifest.inputs.get("shards") for name, run in runs.items()}
    if len(set(digests.values())) > 1:
        first, *rest = digests
        other = next(name for name in rest if digests[name] != digests[first])
        raise UserError(
            f"runs {first!r} and {other!r} used different shards, so their losses cannot be compared",
            where=str(runs[other].folder),
            fix="train all runs of a comparison on the same shards",
        )
