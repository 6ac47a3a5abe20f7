"""Plans a run before it does anything: which steps are done, which will run and why, and what they cost.

This module does not depend on Prefect.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from fvlm_core.config import Recipe
from fvlm_core.data.jobs import INDEX_FILE
from fvlm_core.dotted import differences, with_changes
from fvlm_core.errors import UserError
from fvlm_core.manifest import AnyManifest
from fvlm_core.settings import Settings
from fvlm_core.tables import Table
from fvlm_core.train.expected import ExpectedCost, MeanSample, expected_cost
from fvlm_core.train.jobs import RunManifest
from tasks.config import PipelineConfig
from tasks.phase import PHASES_FOLDER, Changes, EarlierResults, Phase, PhaseManifest, Results
from tasks.steps import STEPS, Step, StepResult, StepState, in_dependency_order, read_record

TRAINING = "fvlm_core.train"
PART = re.compile(r"-\d{5}$")
"""Suffix in the name of a step that is one part of a job, e.g. `download-openvid-00012`."""
REASONS_SHOWN = 3
RECIPES = "recipes"
"""Phase name of recipes that are trained by themselves."""
MOST_AT_ONCE = 8
"""Maximum number of concurrent steps of a phase."""
HEAD = ["phase", "step", "state", "because", "samples", "FLOPs", "time"]


class StepPlan(Settings):
    """The plan of one step."""

    phase: str
    step: str
    state: Literal["cached", "runs"]
    because: str = ""
    """Why it runs, or the condition under which it stays cached."""
    samples: int | None = None
    flops: float | None = None
    flops_range: tuple[float, float] | None = None
    """FLOPs with the smallest and with the largest model, if an earlier phase has yet to choose the model's size."""
    seconds: float | None = None
    """Expected duration on this machine, from measurements on this volume; None if there are none."""


class Plan(Settings):
    """All steps of all phases, in order."""

    steps: list[StepPlan]
    warnings: list[str] = Field(default_factory=list)
    """Results that other code made, and inputs that are not here."""
    overlap: dict[str, float] = Field(default_factory=dict)
    """Measured ratio of a phase's duration to the sum of its steps' durations, by phase. It is below 1 if steps run concurrently."""

    def table(self) -> Table:
        """Return a row per step that runs, and one per phase for its cached steps."""
        rows = []
        for phase, mine in self._by_phase():
            cached = [one for one in mine if one.state == "cached"]
            if cached:
                conditions = "; ".join(dict.fromkeys(one.because for one in cached if one.because))
                rows.append([phase, f"{len(cached)} of {len(mine)} steps", "cached", conditions, "", "", ""])
            for name, steps in _together(one for one in mine if one.state == "runs"):
                shown = steps[0].step if len(steps) == 1 else f"{name} ({len(steps)} parts)"
                rows.append([phase, shown, "will run", steps[0].because, *_costs(steps)])
        return Table(title="Plan", head=HEAD, rows=rows, note=self._note())

    def of(self, phase: str | None) -> "Plan":
        """Return the part of the plan for a phase, or all of it for None."""
        return self if phase is None else self.model_copy(update={"steps": [one for one in self.steps if one.phase == phase]})

    def summary(self) -> Table:
        """Return a row per phase."""
        rows = []
        for phase, mine in self._by_phase():
            running = [one for one in mine if one.state == "runs"]
            conditions = [one.because for one in (running or mine) if one.because]
            because = "; ".join(list(dict.fromkeys(conditions))[:2])
            rows.append(
                [phase, f"{len(running or mine)} of {len(mine)} steps", "will run" if running else "cached", because, *_costs(running)]
            )
        return Table(title="Plan", head=HEAD, rows=rows, note=self._note())

    def _by_phase(self) -> Iterator[tuple[str, list[StepPlan]]]:
        for phase in dict.fromkeys(one.phase for one in self.steps):
            yield phase, [one for one in self.steps if one.phase == phase]

    def _note(self) -> str:
        running = [one for one in self.steps if one.state == "runs"]
        lines = ["Nothing to do: every step is done."]
        if running:
            known = [one.seconds for one in running if one.seconds is not None]
            time = (
                f"about {duration(sum(known))} one after the other, as measured on this volume"
                if known
                else "no time was measured here yet"
            )
            unknown = f"; the time of {len(running) - len(known)} steps is not known" if 0 < len(known) < len(running) else ""
            lines = [f"{len(running)} of {len(self.steps)} steps run: {time}{unknown}."]
        return "\n".join([*lines, *self.warnings])


class StepInspection(NamedTuple):
    """A step and its result, if there is one."""

    phase: str
    step: Step
    """The step, with existing results as inputs. Inputs that are not made yet are still steps."""
    found: StepState
    undecided: tuple[str, ...]
    """Earlier phases that will run and may change the decisions that its settings depend on."""


def inspect_steps(
    phases: Sequence[Phase], config: PipelineConfig, volume: Path, *, absent: list[str] | None = None
) -> Iterator[StepInspection]:
    """Yield every step of the phases, in order, without reading the contents of large files.

    If `absent` is given, external inputs may be missing, because they are on another machine; a message about each is appended to it.
    """
    known: dict[str, dict[str, StepResult | Step]] = {}
    decided: dict[str, Changes] = {}
    folders = {phase.name: phase.folder(config, volume) for phase in phases}
    for phase in phases:
        try:
            phase.prepare(config, volume)
        except UserError as error:
            if absent is None:
                raise
            absent.append(error.what)
    undecided: list[str] = []
    for phase in phases:
        steps = phase.steps(config, EarlierResults(volume, known, decided, folders))
        made: dict[str, StepResult] = {}
        for step in (step for wave in in_dependency_order(steps) for step in wave):
            bound = step.bound(made)
            waits = [need.name for need in bound.needs]
            found = StepState(None, _waits(waits)) if waits else bound.find(volume, "sizes", config.machine.on_code_change)
            if found.made:
                made[step.name] = found.made
            yield StepInspection(phase.name, bound, found, tuple(undecided))
        known[phase.name] = {step.name: made.get(step.name, step) for step in steps}
        done = len(made) == len(steps)
        undecided += [] if done else [phase.name]
        decided[phase.name] = phase.decide(config, Results(volume, made)) if done else _last_decision(phase, volume)


def plan(phases: Sequence[Phase], config: PipelineConfig, volume: Path, *, measured: Path | None = None) -> Plan:
    """Return what a run of the phases would do now. `measured` is the volume whose steps give the durations; by default this one."""
    plans: list[StepPlan] = []
    warnings: list[str] = []
    speeds, rental = Speeds(measured or volume), config.machine.rental
    absent: list[str] | None = [] if rental else None
    for phase, step, found, undecided in inspect_steps(phases, config, volume, absent=absent):
        if found.made:
            condition = f"unless {' or '.join(undecided)} decides otherwise" if undecided else ""
            plans.append(StepPlan(phase=phase, step=step.name, state="cached", because=condition))
            warnings += [f"{step.name} was made by other code: {'; '.join(found.other_code)}"] if found.other_code else []
            continue
        cost = _cost(step, volume, rental.assumed.samples if rental else {})
        because = found.reason if step.needs else _explain(step, found, volume)
        seconds = speeds.seconds(step, cost.flops)
        sizes = _flops_by_size(step, config, volume, rental.assumed.samples) if rental and "scaling" in undecided else []
        costs = {"samples": cost.samples, "flops": cost.flops, "flops_range": (min(sizes), max(sizes)) if sizes else None}
        plans.append(StepPlan(phase=phase, step=step.name, state="runs", because=because, seconds=seconds, **costs))
    warnings += [f"not here, so assumed: {what}" for what in absent or []]
    overlap = {phase.name: share for phase in phases if (share := speeds.overlap(phase.name)) is not None}
    return Plan(steps=plans, warnings=warnings, overlap=overlap)


def plan_recipes(recipes: Iterable[Recipe], config: PipelineConfig, volume: Path) -> Plan:
    """Return what recipes that are trained by themselves (`python -m fvlm_core.train`) would cost.

    Costs are those on the recipes' shards if these are here, otherwise on the mean samples that the profile assumes. Durations come from
    measurements on `volume`.
    """
    rates, rental, plans = Speeds(volume).rates, config.machine.rental, []
    for recipe in recipes:
        there = recipe.shards if (recipe.shards / INDEX_FILE).is_file() else None
        cost = expected_cost(recipe, there, rental.assumed.samples if rental else {})
        seconds = cost.flops / median(rates) if cost.flops and rates else None
        costs: dict[str, Any] = {"samples": cost.samples, "flops": cost.flops, "seconds": seconds}
        plans.append(StepPlan(phase=RECIPES, step=recipe.name, state="runs", because="it was asked for", **costs))
    return Plan(steps=plans)


class Speeds:
    """Durations of the jobs on a volume."""

    def __init__(self, volume: Path) -> None:
        self.volume = volume
        self.rates: list[float] = []
        for folder in _newest(volume, "*"):
            with suppress(UserError):
                run = RunManifest.read(folder)
                self.rates += [run.flops / run.seconds] if run.seconds else []

    def overlap(self, phase: str) -> float | None:
        """Return the ratio of the phase's last duration to the sum of its steps' durations; None if it did not make all of its steps."""
        manifest = _last_manifest(phase, self.volume)
        if manifest is None:
            return None
        alone = 0.0
        for made in manifest.steps.values():
            with suppress(UserError):
                alone += made.manifest(self.volume).seconds
        # a ratio below 1 / MOST_AT_ONCE means that some of its steps already existed
        return manifest.seconds / alone if alone and manifest.seconds > alone / MOST_AT_ONCE else None

    def seconds(self, step: Step, flops: float | None) -> float | None:
        """Return the expected seconds of a step: those of the last step of its name, in proportion to FLOPs if it trains.

        A part takes as long as another part of the same job.
        """
        part = PART.search(step.name)
        for folder in _newest(self.volume, f"{PART.sub('', step.name)}-?????" if part else step.name):
            with suppress(UserError):
                last = AnyManifest.read(folder)
                before = (last.model_extra or {}).get("flops")
                if last.seconds:
                    return last.seconds * (flops / before if flops and before else 1.0)
        return flops / median(self.rates) if flops and self.rates and step.module == TRAINING else None


def _cost(step: Step, volume: Path, assumed: Mapping[str, MeanSample]) -> ExpectedCost:
    """Return the cost of a training step, on `assumed` samples if there are no shards, or the number of rows of a download."""
    if step.module != TRAINING:
        return ExpectedCost(step.settings.get("rows"), None)
    places = {path: str(volume / given.folder) for path, given in step.inputs.items() if isinstance(given, StepResult)}
    try:
        recipe = Recipe.model_validate(with_changes(step.settings, places) | {"output": "output"})
    except ValidationError:
        return ExpectedCost(None, None)
    return expected_cost(recipe, recipe.shards if "shards" in places else None, assumed)


def _flops_by_size(step: Step, config: PipelineConfig, volume: Path, assumed: Mapping[str, MeanSample]) -> list[float]:
    """Return the FLOPs of a training step with each size that the grid may choose."""
    if step.module != TRAINING:
        return []
    changes = [{"model.llm": size.llm.model_dump(mode="json")} for size in config.scaling.sizes]
    costs = [_cost(replace(step, settings=with_changes(step.settings, change)), volume, assumed).flops for change in changes]
    return [cost for cost in costs if cost is not None]


def _explain(step: Step, found: StepState, volume: Path) -> str:
    """Return why a step runs: what differs from the last step of its name, or what is wrong with its result."""
    if (volume / step.folder).exists():
        return found.reason
    last = next((record for folder in _newest(volume, step.name) if (record := read_record(folder))), None)
    if last is None:
        return found.reason
    now = step.record
    changed = [f"{path}: {_value(before)} -> {_value(after)}" for path, (before, after) in differences(last.settings, now.settings).items()]
    changed += [f"{path} has changed" for path in differences(last.inputs, now.inputs)]
    more = f" and {len(changed) - REASONS_SHOWN} more" if len(changed) > REASONS_SHOWN else ""
    return "; ".join(changed[:REASONS_SHOWN]) + more if changed else found.reason


def _newest(volume: Path, name: str) -> Iterable[Path]:
    """Return the folders of steps whose name matches a pattern, newest first."""
    there = [folder for folder in (volume / STEPS).glob(f"{name}-*") if folder.is_dir()]
    folders = [folder for folder in there if fnmatchcase(folder.name.rpartition("-")[0], name)]
    return sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)


def _last_decision(phase: Phase, volume: Path) -> Changes:
    """Return the phase's last decision, with any profile."""
    manifest = _last_manifest(phase.name, volume)
    return manifest.decided if manifest else {}


def _last_manifest(phase: str, volume: Path) -> PhaseManifest | None:
    """Return the phase's newest readable manifest, with any profile."""
    folders = sorted((volume / PHASES_FOLDER).glob(f"{phase}-*/manifest.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in folders:
        with suppress(UserError):
            return PhaseManifest.read(path.parent)
    return None


def _waits(names: list[str]) -> str:
    return f"it reads {', '.join(names) if len(names) <= REASONS_SHOWN else f'{len(names)} steps'} that will run"


def _together(steps: Iterable[StepPlan]) -> list[tuple[str, list[StepPlan]]]:
    """Group the steps that are parts of one job and run for the same reason, by the job's name; other steps are alone."""
    groups: dict[tuple[str, str], list[StepPlan]] = {}
    for one in steps:
        groups.setdefault((PART.sub("", one.step), one.because), []).append(one)
    return [(name, group) for (name, _), group in groups.items()]


def _costs(steps: Sequence[StepPlan]) -> list[str]:
    """Return the total samples, FLOPs and time of steps, as far as known, as text."""
    samples = sum(one.samples or 0 for one in steps)
    flops = sum(one.flops or 0.0 for one in steps)
    seconds = sum(one.seconds or 0.0 for one in steps)
    return [f"{samples:,}" if samples else "", f"{flops:.2e}" if flops else "", duration(seconds) if seconds else ""]


def duration(seconds: float) -> str:
    """Format a duration, e.g. `35 s`, `12 min`, `2.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _value(value: object) -> str:
    return "nothing" if value is None else f"{value!r:.40}"
