"""The table of phases, and what a phase leaves on the volume.

A phase's folder is named by a key made of the configuration alone, so that a phase that runs by itself finds the results of
those before it; its manifest records the digests of what it was made from, so that stale results are told from current ones.
Nothing in this file knows Prefect.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, JsonValue

from fvlm_core.dotted import value_at
from fvlm_core.errors import UserError
from fvlm_core.manifest import Manifest
from fvlm_core.settings import hash_json
from infra.stack import CPU_POOL, GPU_POOL
from tasks.config import PipelineConfig
from tasks.outside import external_inputs
from tasks.steps import KEY_LENGTH, Made, Verify

PHASES_FOLDER = "phases"
"""Folder of the volume that holds a folder per phase."""


class Phase(NamedTuple):
    """A phase of the pipeline."""

    name: str
    pool: str
    """Work pool of its deployment."""
    upstream: tuple[str, ...]
    """Phases whose results it uses."""
    parts: tuple[str, ...]
    """Dotted paths of the configuration that it reads."""
    version: int = 1
    """Raised when the phase makes something else from equal configuration and equal steps."""


PHASES = {
    phase.name: phase
    for phase in (
        Phase("precompute", CPU_POOL.name, (), ("precompute", "model.vision")),
        Phase("speed", GPU_POOL.name, ("precompute",), ("model", "base", "speed")),
        Phase("ablations", GPU_POOL.name, ("precompute", "speed"), ("model", "base", "ablations", "ablation_min_gain")),
        Phase("scaling", GPU_POOL.name, ("precompute", "speed", "ablations"), ("model", "base", "scaling")),
        Phase("train", GPU_POOL.name, ("precompute", "speed", "ablations", "scaling"), ("model", "base", "stages")),
        Phase("evaluate", GPU_POOL.name, ("precompute", "train"), ("evaluation",)),
        Phase("release", CPU_POOL.name, ("precompute", "speed", "ablations", "scaling", "train", "evaluate"), ("release",)),
    )
}


class PhaseManifest(Manifest):
    """A finished phase: its steps, and what later phases take from it. `inputs` are the digests of the phases it used."""

    steps: dict[str, Made]
    chosen: dict[str, JsonValue] = Field(default_factory=dict)
    """Changes that the phase decided on, by dotted path of a recipe; later phases lay them over their own."""
    rows: list[dict[str, JsonValue]] = Field(default_factory=list)
    """The phase's table, a dict per row."""

    @property
    def digest(self) -> str:
        """Identity of what the phase decided and made."""
        return hash_json([self.name, {name: made.digest for name, made in self.steps.items()}, self.chosen])

    def step_problems(self, volume: Path, verify: Verify) -> list[str]:
        """What is missing or damaged in the phase's steps."""
        return [problem for made in self.steps.values() for problem in made.problems(volume, verify)]


def phase_key(phase: str, config: PipelineConfig) -> str:
    """Identity of the phase's configuration and of all before it."""
    spec = PHASES[phase]
    values = config.model_dump(mode="json")
    parts = {path: value_at(values, path) for path in spec.parts}
    return hash_json([phase, spec.version, parts, [phase_key(name, config) for name in spec.upstream]])[:KEY_LENGTH]


def phase_folder(phase: str, config: PipelineConfig, volume: Path) -> Path:
    """Where the phase's manifest and live status are."""
    return volume / PHASES_FOLDER / f"{phase}-{phase_key(phase, config)}"


def current(phase: str, config: PipelineConfig, volume: Path, *, upstream: Mapping[str, PhaseManifest]) -> PhaseManifest | None:
    """The phase's result if it is there, whole, and was made from what `upstream` and the outside hold now."""
    try:
        manifest = PhaseManifest.read(phase_folder(phase, config, volume))
    except UserError:
        return None
    if manifest.inputs != inputs_of(phase, config, volume, upstream):
        return None
    return None if manifest.step_problems(volume, config.machine.verify) else manifest


def inputs_of(phase: str, config: PipelineConfig, volume: Path, upstream: Mapping[str, PhaseManifest]) -> dict[str, str]:
    """What a manifest of the phase made now has as `inputs`."""
    outside = {} if PHASES[phase].upstream else external_inputs(config, volume)
    return {name: upstream[name].digest for name in PHASES[phase].upstream} | outside


def require_upstream(phase: str, config: PipelineConfig, volume: Path) -> dict[str, PhaseManifest]:
    """Results of all phases that `phase` rests on.

    Raises UserError that names the deployment to run first, where one is missing, damaged or stale.
    """
    found: dict[str, PhaseManifest] = {}
    for name in (name for name in PHASES if name in ancestors(phase)):
        folder = phase_folder(name, config, volume)
        fix = f"run the deployment {name}/{config.name} first, or the whole pipeline/{config.name}"
        try:
            manifest = PhaseManifest.read(folder)
        except UserError as error:
            raise UserError(f"{phase} needs the results of {name}, which are not there", where=str(folder), fix=fix) from error
        if problems := manifest.step_problems(volume, config.machine.verify):
            raise UserError(f"the results of {name} are damaged: {'; '.join(problems[:5])}", where=str(folder), fix=fix)
        if manifest.inputs != inputs_of(name, config, volume, found):
            raise UserError(f"the results of {name} are older than what they were made from", where=str(folder), fix=fix)
        found[name] = manifest
    return found


def ancestors(phase: str) -> set[str]:
    """Every phase that `phase` rests on, directly or not."""
    return {above for name in PHASES[phase].upstream for above in {name} | ancestors(name)}
