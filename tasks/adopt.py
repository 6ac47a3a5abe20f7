"""Adopts a finished result from elsewhere as the result of a step, after checking that the step would make the same."""

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
from tasks.steps import RECORD, STEPS, Step, StepRecord, StepResult, read_record

SETTINGS_FILES = ("recipe.yaml", "job.yaml")
"""Files with the settings of a job in its folder, for a folder without the record of a step."""
FILLED_BY = {"vision": "model.vision.checkpoint", "llm": "model.llm.checkpoint"}
"""Settings that inputs of a training run fill, by the input's name in its manifest, if the names differ."""
SHOWN = 5


def adopt(step: Step, folder: Path, volume: Path) -> StepResult:
    """Copy the result in `folder` to the step's own folder on the volume.

    Raises UserError if an input of the step is missing, if the result is damaged or was made with other settings or from other inputs, or
    if the step is already done or being made.
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
    odd += [f"it does not say from which {name} it was made" for name in wanted.inputs if name not in theirs.inputs]
    odd += [f"it was made from another {name}" for name, digest in wanted.inputs.items() if theirs.inputs.get(name, digest) != digest]
    if odd:
        raise UserError(
            f"this is not a result of {step.name}: {'; '.join(odd[:SHOWN])}",
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
    return StepResult(name=step.name, folder=step.folder, digest=manifest.digest)


def _record(folder: Path, manifest: AnyManifest) -> StepRecord:
    """Return what the result was made from: the record of its step, or its settings file and the inputs in its manifest."""
    if record := read_record(folder):
        return record
    files = [folder / name for name in SETTINGS_FILES if (folder / name).is_file()]
    if not files:
        raise UserError("the result does not say what it was made with", where=str(folder), fix=f"it needs a {' or '.join(SETTINGS_FILES)}")
    settings: Any = read_yaml(files[0])
    if not isinstance(settings, Mapping):
        raise UserError("the settings are not a mapping", where=str(files[0]), fix="copy the result again")
    return StepRecord(settings=dict(settings), inputs={FILLED_BY.get(name, name): digest for name, digest in manifest.inputs.items()})


def _without_places(settings: dict[str, Any], wanted: StepRecord) -> dict[str, Any]:
    """Return the settings with the step's own values for all inputs, because inputs are compared by content and not by path."""
    for path in wanted.inputs:
        with contextlib.suppress(UnknownPathError):  # an item of a list, or an input at the top level, is not a setting
            settings = with_changes(settings, {path: value_at(wanted.settings, path)})
    return settings
