"""Takes a finished result from elsewhere as the result of a step, after checking that it is what the step would make."""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fvlm_core.dotted import UnknownPathError, differences, value_at, with_changes
from fvlm_core.errors import UserError
from fvlm_core.manifest import AnyManifest, write_atomically
from fvlm_core.settings import read_yaml
from infra.locks import locked
from tasks.steps import RECORD, STEPS, Made, Step, StepRecord, read_record

SETTINGS_FILES = ("recipe.yaml", "job.yaml")
"""Where a job's own folder says its settings, where it has no record of a step."""
FILLED_BY = {"vision": "model.vision.checkpoint", "llm": "model.llm.checkpoint"}
"""The setting that an input of a training run fills, where its manifest calls the input something else."""
SHOWN = 5


def adopt(step: Step, folder: Path, volume: Path) -> Made:
    """Copy the result in `folder` to where the step's result belongs; `step` has all its inputs.

    Raises UserError where it is damaged, was made with other settings or of other inputs, or the step is done already or being made.
    """
    if step.needs:
        names = ", ".join(need.name for need in step.needs)
        raise UserError(f"{step.name} reads {names}, which is not there yet", where=str(volume), fix=f"make or adopt {names} first")
    target = volume / step.folder
    if step.find(volume, "sha256").made:
        raise UserError(
            f"{step.name} is done already", where=str(target), fix="nothing has to be adopted; delete that folder to replace it"
        )
    manifest = AnyManifest.read(folder)
    if problems := manifest.problems(folder):
        raise UserError(f"the result is damaged: {'; '.join(problems[:SHOWN])}", where=str(folder), fix="copy it again")
    wanted, theirs = step.record, _record(folder, manifest)
    settings = {name: value for name, value in theirs.settings.items() if name in wanted.settings}
    settings = _without_places(settings, wanted)
    odd = [f"{path} is {now!r}, not {want!r}" for path, (want, now) in differences(wanted.settings, settings).items() if now != want]
    odd += [f"it does not say of which {name} it was made" for name in wanted.inputs if name not in theirs.inputs]
    odd += [f"it was made of another {name}" for name, digest in wanted.inputs.items() if theirs.inputs.get(name, digest) != digest]
    if odd:
        raise UserError(
            f"that is no result of {step.name}: {'; '.join(odd[:SHOWN])}",
            where=str(folder),
            fix="change the profile to what it was made with, or adopt another result",
        )

    def busy() -> None:
        raise UserError(f"{step.name} is being made by another process", where=str(target), fix="wait for its end, or end it first")

    with locked(step.lock(volume), waiting=busy):
        arriving = volume / STEPS / f".arriving-{target.name}"
        shutil.rmtree(arriving, ignore_errors=True)
        shutil.copytree(folder, arriving)
        write_atomically(arriving / RECORD, wanted.model_dump_json(indent=2).encode())
        shutil.rmtree(target, ignore_errors=True)
        arriving.rename(target)
    return Made(name=step.name, folder=step.folder, digest=manifest.digest)


def _record(folder: Path, manifest: AnyManifest) -> StepRecord:
    """What the result was made of: its step's record, else its settings file and the inputs that its manifest names."""
    if record := read_record(folder):
        return record
    files = [folder / name for name in SETTINGS_FILES if (folder / name).is_file()]
    if not files:
        raise UserError("the result does not say what it was made with", where=str(folder), fix=f"it needs a {' or '.join(SETTINGS_FILES)}")
    settings: Any = read_yaml(files[0])
    if not isinstance(settings, Mapping):
        raise UserError("the settings are not a list of keys", where=str(files[0]), fix="copy the result again")
    return StepRecord(settings=dict(settings), inputs={FILLED_BY.get(name, name): digest for name, digest in manifest.inputs.items()})


def _without_places(settings: dict[str, Any], wanted: StepRecord) -> dict[str, Any]:
    """The settings with what the step has where an input is filled in: inputs are compared by content, not by where they were."""
    for path in wanted.inputs:
        with contextlib.suppress(UnknownPathError):  # of a list's places, or at the top, where they are no settings
            settings = with_changes(settings, {path: value_at(wanted.settings, path)})
    return settings
