"""What a phase is: the part of the profile it reads, its steps, what it decides for later phases, what it shows; and what it leaves.

A phase's folder is named by a key made of the profile alone, so that a phase that runs by itself finds the results of those before
it; its manifest records the digests of what it was made from, so that outdated results are noticed. Nothing in this file knows Prefect.
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
from tasks.steps import KEY_LENGTH, Input, Made, Step, Verify

PHASES_FOLDER = "phases"
"""Folder of the volume that holds a folder per phase."""

PoolRole = Literal["cpu", "gpu"]
Changes = Mapping[str, JsonValue]
"""Settings of a recipe by dotted path."""


class Shown(Settings):
    """What a phase shows of its results."""

    table: Table | None = None
    text: str = ""
    """What was decided, and what the table shows, in markdown."""
    figures: list[Figure] = Field(default_factory=list)
    """With files relative to the volume."""
    closing: list[Table] = Field(default_factory=list)
    """Tables that the command prints at its end."""
    outputs: dict[str, str] = Field(default_factory=dict)
    """Files and folders for the user, relative to the volume, by what they are."""


class Before:
    """What the phases before one have left: their steps as inputs, and what they decided."""

    def __init__(
        self, volume: Path, steps: Mapping[str, Mapping[str, Made | Step]], decided: Mapping[str, Changes], folders: Mapping[str, Path]
    ) -> None:
        """By phase, in the order of the phases: steps by name (a Step where it is not made yet), decisions, folders of the manifests."""
        self.volume, self.folders = volume, folders
        self._steps, self._decided = steps, decided

    def step(self, phase: str, name: str) -> Input:
        """A step of an earlier phase."""
        return self._steps[phase][name]

    def steps(self, phase: str) -> Mapping[str, Input]:
        """All steps of an earlier phase by name."""
        return self._steps.get(phase, {})

    @property
    def changes(self) -> dict[str, JsonValue]:
        """What all earlier phases decided, the later ones' word last."""
        return {path: value for decided in self._decided.values() for path, value in decided.items()}


@dataclass(frozen=True)
class Results:
    """The finished steps of a phase."""

    volume: Path
    made: Mapping[str, Made]

    def folder(self, step: str) -> Path:
        """Where a step's result is."""
        return self.volume / self.made[step].folder

    def figures(self, step: str, kind: type[Manifest]) -> list[Figure]:
        """The figures that a step of this kind drew."""
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
    steps: Callable[[PipelineConfig, Before], list[Step]]
    """Its steps; they may hold steps that are not made yet as inputs."""
    show: Callable[[PipelineConfig, Results], Shown]
    after: "tuple[Phase, ...]" = ()
    """Phases whose results it uses."""
    decide: Callable[[PipelineConfig, Results], Changes] = lambda config, results: {}
    """Changes that later phases apply to their recipes."""
    learn: Callable[[PipelineConfig, Results], Sequence[Experiment]] = lambda config, results: ()
    """What its runs were to show and what they showed, for the experiment log."""
    prepare: Callable[[PipelineConfig, Path], object] = lambda config, volume: None
    """Looks at what is outside the volume, once before a run; `outside` and `steps` rely on what it noted on the volume."""
    outside: Callable[[PipelineConfig, Path], Mapping[str, str]] = lambda config, volume: {}
    """Digests of what it reads from outside the volume, by name."""
    links: Mapping[str, str] = field(default_factory=dict)
    """Names on the volume that lead to the newest result of a step."""
    helpers: Callable[[PipelineConfig], int] = lambda config: 0
    """More flow runs that make its steps, each on a worker of its own; for steps that need no others."""
    schedule: str | None = None
    """Cron line of its deployment's schedule, which is made paused."""

    @property
    def ancestors(self) -> "list[Phase]":
        """Every phase that it rests on, directly or not, each once, in an order in which they can run."""
        found: dict[str, Phase] = {}
        for phase in self.after:
            found |= {one.name: one for one in (*phase.ancestors, phase)}
        return list(found.values())

    def key(self, config: PipelineConfig) -> str:
        """Identity of its part of the profile and of the parts of all before it."""
        return self._key(config.identity_values())

    def _key(self, values: dict[str, Any]) -> str:
        parts = {path: value_at(values, path) for path in self.reads}
        return hash_json([self.name, parts, [phase._key(values) for phase in self.after]])[:KEY_LENGTH]

    def folder(self, config: PipelineConfig, volume: Path) -> Path:
        """Where its manifest and its progress are."""
        return volume / PHASES_FOLDER / f"{self.name}-{self.key(config)}"

    def inputs(self, config: PipelineConfig, volume: Path, done: "Mapping[str, PhaseManifest]") -> dict[str, str]:
        """What a manifest made now has as `inputs`, given those of the phases before."""
        return {phase.name: done[phase.name].digest for phase in self.after} | dict(self.outside(config, volume))


class PhaseManifest(Manifest):
    """A finished phase: its steps, what later phases take from it, what it shows. `inputs`: digests of the phases it used."""

    steps: dict[str, Made]
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
        """What is missing or damaged in the phase's steps."""
        return [problem for made in self.steps.values() for problem in made.problems(volume, verify)]

    def steps_of_other_code(self, volume: Path) -> dict[str, list[str]]:
        """How the code of now differs from that which made each step, where it does."""
        found = {name: made.manifest(volume).other_code for name, made in self.steps.items()}
        return {name: changes for name, changes in found.items() if changes}


def before_of(phase: Phase, config: PipelineConfig, volume: Path, done: Mapping[str, PhaseManifest]) -> Before:
    """What the phases before `phase`, which are done, have left."""
    return Before(
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
    """The phase's result if it is there, intact, and was made from what `done` (the phases before) and the outside hold now."""
    try:
        manifest = PhaseManifest.read(phase.folder(config, volume))
    except UserError:
        return None
    if manifest.inputs != phase.inputs(config, volume, done) or manifest.step_problems(volume, config.machine.verify):
        return None
    return None if config.machine.on_code_change == "rerun" and manifest.steps_of_other_code(volume) else manifest


def require(phases: Sequence[Phase], config: PipelineConfig, volume: Path, *, by: str, verify: Verify) -> dict[str, PhaseManifest]:
    """Results of `phases`, which are in an order in which they can run, for the phase called `by`.

    Raises UserError that names the deployment to run first, where one is missing, damaged or outdated.
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
    """Let the phase's links on the volume point to its steps."""
    for link, step in phase.links.items():
        point(volume / link, manifest.steps[step].folder)


def point(link: Path, folder: str) -> None:
    """Make `link` a symbolic link to `folder`, which is relative to where the link is, in one step; something else of that name stays."""
    if link.exists() and not link.is_symlink():
        return
    new = link.with_name(f".{link.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(folder)
    new.replace(link)
