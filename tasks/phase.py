"""What a phase is: the part of the profile it reads, its steps, what it decides for later phases, what it shows, and its manifest.

The key in the name of a phase's folder depends on the profile alone, so that a phase that runs by itself finds the results of earlier
phases. Its manifest records the digests of its inputs, so that outdated results are detected. This module does not depend on Prefect.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, JsonValue

from fvlm_core.dotted import value_at
from fvlm_core.errors import UserError
from fvlm_core.experiments import Experiment
from fvlm_core.figures import Figure
from fvlm_core.manifest import Manifest
from fvlm_core.settings import Settings, hash_json
from fvlm_core.tables import Table
from tasks.config import PipelineConfig
from tasks.knowledge import append_experiments
from tasks.steps import KEY_LENGTH, Input, Step, StepResult, Verify

PHASES_FOLDER = "phases"
"""Folder of the volume that holds a folder per phase."""

PoolRole = Literal["cpu", "gpu"]
Changes = Mapping[str, JsonValue]
"""Settings of a recipe by dotted path."""


class Shown(Settings):
    """The results of a phase that are shown to the user."""

    table: Table | None = None
    text: str = ""
    """What was decided, and what the table shows, in markdown."""
    figures: list[Figure] = Field(default_factory=list)
    """Figures, with files relative to the volume."""
    closing: list[Table] = Field(default_factory=list)
    """Tables that the command prints at its end."""
    outputs: dict[str, str] = Field(default_factory=dict)
    """Files and folders for the user, relative to the volume, by description."""


class EarlierResults:
    """The results of the phases before one: their steps, as inputs, and their decisions."""

    def __init__(
        self,
        volume: Path,
        steps: Mapping[str, Mapping[str, StepResult | Step]],
        decided: Mapping[str, Changes],
        folders: Mapping[str, Path],
    ) -> None:
        """All arguments are by phase, in the order of the phases: steps by name (`Step` if not made yet), decisions, manifest folders."""
        self.volume, self.folders = volume, folders
        self._steps, self._decided = steps, decided

    def step(self, phase: str, name: str) -> Input:
        """Return a step of an earlier phase."""
        return self._steps[phase][name]

    def steps(self, phase: str) -> Mapping[str, Input]:
        """Return all steps of an earlier phase by name."""
        return self._steps.get(phase, {})

    @property
    def changes(self) -> dict[str, JsonValue]:
        """The decisions of all earlier phases; those of later phases override those of earlier ones."""
        return {path: value for decided in self._decided.values() for path, value in decided.items()}


@dataclass(frozen=True)
class Results:
    """The finished steps of a phase."""

    volume: Path
    made: Mapping[str, StepResult]

    def folder(self, step: str) -> Path:
        """Return the folder of a step's result."""
        return self.volume / self.made[step].folder

    def figures(self, step: str, kind: type[Manifest]) -> list[Figure]:
        """Return the figures that a step drew; `kind` is the type of its manifest."""
        folder = self.made[step].folder
        drawn = [figure for figure in kind.figures if (self.volume / folder / figure.file).is_file()]
        return [figure.model_copy(update={"file": f"{folder}/{figure.file}"}) for figure in drawn]


@dataclass(frozen=True)
class Phase:
    """A phase of the pipeline."""

    name: str
    purpose: str
    """What it does, in a sentence; the description of its flow."""
    pool: PoolRole
    """Kind of machine that it runs on."""
    reads: tuple[str, ...]
    """Dotted paths of the profile that its results depend on."""
    steps: Callable[[PipelineConfig, EarlierResults], list[Step]]
    """Returns its steps, whose inputs may be steps that are not made yet."""
    show: Callable[[PipelineConfig, Results], Shown]
    after: "tuple[Phase, ...]" = ()
    """Phases whose results it uses."""
    decide: Callable[[PipelineConfig, Results], Changes] = lambda config, results: {}
    """Returns the changes that later phases apply to their recipes."""
    learn: Callable[[PipelineConfig, Results], Sequence[Experiment]] = lambda config, results: ()
    """Returns what its runs were meant to show and what they showed, for the experiment log."""
    prepare: Callable[[PipelineConfig, Path], object] = lambda config, volume: None
    """Called once before a run to record inputs from outside the volume; `outside` and `steps` rely on these records."""
    outside: Callable[[PipelineConfig, Path], Mapping[str, str]] = lambda config, volume: {}
    """Returns the digests of its inputs from outside the volume, by name."""
    links: Mapping[str, str] = field(default_factory=dict)
    """Links on the volume to the newest result of a step: the step's name by the link's name."""
    helpers: Callable[[PipelineConfig], int] = lambda config: 0
    """Returns the number of further flow runs that make its steps, each on its own worker; only for steps that need no other step."""
    schedule: str | None = None
    """Cron expression of its deployment's schedule, which is created paused."""

    @property
    def ancestors(self) -> "list[Phase]":
        """All phases that it depends on, directly or indirectly, in an order in which they can run."""
        found: dict[str, Phase] = {}
        for phase in self.after:
            found |= {one.name: one for one in (*phase.ancestors, phase)}
        return list(found.values())

    def key(self, config: PipelineConfig) -> str:
        """Return the key of its part of the profile and of the parts of all phases that it depends on."""
        return self._key(config.identity_values())

    def _key(self, values: dict[str, Any]) -> str:
        parts = {path: value_at(values, path) for path in self.reads}
        return hash_json([self.name, parts, [phase._key(values) for phase in self.after]])[:KEY_LENGTH]

    def folder(self, config: PipelineConfig, volume: Path) -> Path:
        """Return the folder of its manifest and its status."""
        return volume / PHASES_FOLDER / f"{self.name}-{self.key(config)}"

    def inputs(self, config: PipelineConfig, volume: Path, done: "Mapping[str, PhaseManifest]") -> dict[str, str]:
        """Return the `inputs` of a manifest written now, given the manifests of the earlier phases."""
        return {phase.name: done[phase.name].digest for phase in self.after} | dict(self.outside(config, volume))


class PhaseManifest(Manifest):
    """A finished phase: its steps, its decisions, what it shows. `inputs` are the digests of the phases and external inputs it used."""

    steps: dict[str, StepResult]
    decided: dict[str, JsonValue] = Field(default_factory=dict)
    """Changes that later phases apply to their recipes, by dotted path."""
    shown: Shown = Shown()
    experiments: list[Experiment] = Field(default_factory=list)
    """Its entries of the experiment log."""

    @property
    def digest(self) -> str:
        """Identity of what the phase decided and made."""
        return hash_json([self.name, {name: made.digest for name, made in self.steps.items()}, self.decided])

    def step_problems(self, volume: Path, verify: Verify) -> list[str]:
        """Return what is missing or damaged in the phase's steps."""
        return [problem for made in self.steps.values() for problem in made.problems(volume, verify)]

    def steps_of_other_code(self, volume: Path) -> dict[str, list[str]]:
        """Return, for each step that other code made, how that code differs from the current code."""
        found = {name: made.manifest(volume).other_code for name, made in self.steps.items()}
        return {name: changes for name, changes in found.items() if changes}


def earlier_results(phase: Phase, config: PipelineConfig, volume: Path, done: Mapping[str, PhaseManifest]) -> EarlierResults:
    """Return the results of the phases before `phase`, which are done."""
    return EarlierResults(
        volume,
        steps={name: one.steps for name, one in done.items()},
        decided={name: one.decided for name, one in done.items()},
        folders={one.name: one.folder(config, volume) for one in phase.ancestors},
    )


def conclude(phase: Phase, config: PipelineConfig, results: Results, done: Mapping[str, PhaseManifest], *, seconds: float) -> PhaseManifest:
    """Write the manifest of a phase whose steps are all made; `done` are the phases before it."""
    manifest = PhaseManifest(
        name=phase.name,
        settings_hash=phase.key(config),
        inputs=phase.inputs(config, results.volume, done),
        steps=dict(results.made),
        decided=dict(phase.decide(config, results)),
        shown=phase.show(config, results),
        experiments=list(phase.learn(config, results)),
        seconds=seconds,
    ).write(phase.folder(config, results.volume))
    append_experiments(results.volume, phase.name, manifest.digest, manifest.created_at, manifest.experiments)
    return manifest


def current(phase: Phase, config: PipelineConfig, volume: Path, *, done: Mapping[str, PhaseManifest]) -> PhaseManifest | None:
    """Return the phase's manifest if it exists, is intact, and has the current inputs: `done` (the earlier phases) and external ones."""
    try:
        manifest = PhaseManifest.read(phase.folder(config, volume))
    except UserError:
        return None
    if manifest.inputs != phase.inputs(config, volume, done) or manifest.step_problems(volume, config.machine.verify):
        return None
    return None if config.machine.on_code_change == "rerun" and manifest.steps_of_other_code(volume) else manifest


def require(phases: Sequence[Phase], config: PipelineConfig, volume: Path, *, by: str, verify: Verify) -> dict[str, PhaseManifest]:
    """Return the manifests of `phases`, given in an order in which they can run, for the phase named `by`.

    Raises UserError, which names the deployment to run first, if one of them is missing, damaged or outdated.
    """
    found: dict[str, PhaseManifest] = {}
    for phase in phases:
        folder = phase.folder(config, volume)
        fix = f"run the deployment {phase.name}/{config.name} first, or pipeline/{config.name} for all phases"
        try:
            manifest = PhaseManifest.read(folder)
        except UserError as error:
            raise UserError(f"{by} needs the results of {phase.name}, which are not there", where=str(folder), fix=fix) from error
        if problems := manifest.step_problems(volume, verify):
            raise UserError(f"the results of {phase.name} are damaged: {'; '.join(problems[:5])}", where=str(folder), fix=fix)
        if manifest.inputs != phase.inputs(config, volume, found):
            raise UserError(f"the results of {phase.name} are older than what they were made from", where=str(folder), fix=fix)
        found[phase.name] = manifest
    return found


def link_steps(phase: Phase, manifest: PhaseManifest, volume: Path) -> None:
    """Point the phase's links on the volume to its steps."""
    for link, step in phase.links.items():
        relink(volume / link, manifest.steps[step].folder)


def relink(link: Path, folder: str) -> None:
    """Atomically make `link` a symbolic link to `folder`, which is relative to the link. Anything else with that name is left alone."""
    if link.exists() and not link.is_symlink():
        return
    new = link.with_name(f".{link.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(folder)
    new.replace(link)
