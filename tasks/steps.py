"""Steps: one job of fvlm_core, its inputs, and the folder on the volume that its result has.

A step's folder is named by a key: the hash of the step's own settings and the digests of its inputs. So a change of one setting gives a
new folder for that step and for all that depend on it, and for nothing else. Settings hold no paths: `input:NAME` stands for
the folder of an input until the job is about to start, so a volume can be moved. Nothing in this file knows Prefect.
"""

import shutil
import threading
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from fvlm_core.errors import UserError
from fvlm_core.manifest import FILE_NAME, AnyManifest, Manifest
from fvlm_core.progress import ProgressReport
from fvlm_core.settings import Settings, hash_json
from infra.launch import DiskFullError, JobRefusedError, launch, python_job, torchrun_job
from infra.locks import locked

STEPS = "steps"
"""Folder of the volume that holds a folder per step."""
INPUT = "input:"
KEY_LENGTH = 12
"""Hex digits of a key in folder names: 48 bits, no collision in any number of steps a volume will hold."""

Verify = Literal["sha256", "sizes"]


class Made(Settings):
    """A finished step: where its folder is on the volume, and the digest of what is in it."""

    name: str
    folder: str
    """Relative to the volume."""
    digest: str

    def manifest(self, volume: Path) -> AnyManifest:
        """The step's manifest."""
        return AnyManifest.read(volume / self.folder)

    def problems(self, volume: Path, verify: Verify) -> list[str]:
        """What is missing or damaged, or differs from what was made; empty when the step is whole."""
        folder = volume / self.folder
        try:
            manifest = AnyManifest.read(folder)
        except UserError as error:
            return [f"{self.folder}: {error.what.splitlines()[0]}"]
        if manifest.digest != self.digest:
            return [f"{self.folder}: made again since, with another result"]
        return [f"{self.folder}/{problem}" for problem in manifest_problems(manifest, folder, verify)]


class Step(Settings):
    """One job to run."""

    name: str
    """Task run name and start of the folder's name, e.g. `stage2`."""
    module: str
    """Run as `python -m MODULE job.yaml`, or under torchrun."""
    settings: dict[str, Any]
    """The job's settings, without `output`; `input:NAME` or `input:NAME/path` stands for the folder of an input."""
    inputs: dict[str, Made] = Field(default_factory=dict)
    external: dict[str, str] = Field(default_factory=dict)
    """Digests of inputs from outside the volume, by name."""
    places: dict[str, str] = Field(default_factory=dict)
    """Paths outside the volume that `input:NAME` may mean too. Not part of the key: what is there is (`external`)."""
    ranks: int = 0
    """Processes of a torchrun job; 0 is a plain process. Not part of the key: results do not depend on it."""
    threads: int = 1
    """OMP_NUM_THREADS of the job. Not part of the key."""
    version: int = 1
    """Raised when the job's code changes what it makes from equal settings."""

    @property
    def key(self) -> str:
        """Identity of the result, before it is made."""
        digests = {name: made.digest for name, made in self.inputs.items()}
        return hash_json([self.name, self.module, self.version, self.settings, digests, self.external])[:KEY_LENGTH]

    @property
    def folder(self) -> str:
        """Folder of the result, relative to the volume."""
        return f"{STEPS}/{self.name}-{self.key}"

    def job_settings(self, volume: Path) -> dict[str, Any]:
        """The settings with `output` and every `input:` reference as absolute paths."""
        return {"output": str(volume / self.folder)} | self._resolved(self.settings, volume)

    def _resolved(self, value: Any, volume: Path) -> Any:
        if isinstance(value, dict):
            return {key: self._resolved(item, volume) for key, item in value.items()}
        if isinstance(value, list):
            return [self._resolved(item, volume) for item in value]
        if isinstance(value, str) and value.startswith(INPUT):
            name, _, rest = value.removeprefix(INPUT).partition("/")
            place = Path(self.places[name]) if name in self.places else volume / self.inputs[name].folder
            return str(place / rest)
        return value

    def found(self, volume: Path, verify: Verify) -> Made | None:
        """The result, if it is on the volume and whole."""
        folder = volume / self.folder
        if not (folder / FILE_NAME).is_file():
            return None
        made = self._made(volume)
        return None if made is None or made.problems(volume, verify) else made

    def _made(self, volume: Path) -> Made | None:
        try:
            return Made(name=self.name, folder=self.folder, digest=AnyManifest.read(volume / self.folder).digest)
        except UserError:
            return None


class Reporter:
    """Where a step's life is reported; the base class reports nothing."""

    def log(self, message: str) -> None:
        """Something a reader of the run's log wants to know."""

    def progress(self, step: str, report: ProgressReport) -> None:
        """The job of `step` has got this far."""


def make(
    step: Step,
    volume: Path,
    *,
    verify: Verify = "sha256",
    min_free_bytes: int = 0,
    stop: threading.Event | None = None,
    reporter: Reporter | None = None,
) -> Made:
    """The step's result: found whole on the volume, or made by its job.

    Only one process makes a step at a time. A folder left half-done by a killed process is handed to the job as it is, to go on from; a
    finished one that was damaged is made again from nothing.

    Raises UserError (the job refuses its input, the disk is full), infra.launch.JobError or JobStoppedError.
    """
    reporter = reporter or Reporter()
    folder = volume / step.folder

    def waiting() -> None:
        reporter.log(f"{step.name}: another process is making it; waiting for it to finish or end")
        if stop is not None and stop.wait(1.0):
            raise InterruptedError(f"{step.name} was cancelled while it waited for another process")

    with locked(volume / STEPS / ".locks" / folder.name, waiting=waiting):
        if found := step.found(volume, verify):
            reporter.log(f"{step.name}: found whole in {step.folder}")
            return found
        if (folder / FILE_NAME).exists():
            made = step._made(volume)
            problems = made.problems(volume, verify) if made else ["manifest.json: damaged"]
            reporter.log(f"{step.name}: damaged since it was made, so it is made again: {'; '.join(problems[:5])}")
            shutil.rmtree(folder)
        _run(step, volume, min_free_bytes=min_free_bytes, stop=stop, reporter=reporter)
        made = step._made(volume)
        if made is None or (problems := made.problems(volume, verify)):
            faults = "; ".join(problems[:5]) if made else "it wrote no manifest.json"
            raise RuntimeError(f"{step.name}: the job ended well but its result is not whole: {faults}")
        return made


def _run(step: Step, volume: Path, *, min_free_bytes: int, stop: threading.Event | None, reporter: Reporter) -> None:
    """Run the step's job in its folder."""
    folder = volume / step.folder
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / ("recipe.yaml" if step.ranks else "job.yaml")
    settings.write_text(yaml.safe_dump(step.job_settings(volume), sort_keys=False))
    command = torchrun_job(step.module, settings, processes=step.ranks) if step.ranks else python_job(step.module, settings)

    def watch() -> None:
        if report := ProgressReport.read(folder):
            reporter.progress(step.name, report)

    reporter.log(f"{step.name}: {' '.join(command)}")
    try:
        launch(command, folder, threads=step.threads, min_free_bytes=min_free_bytes, stop=stop, watch=watch)
    except JobRefusedError as error:
        raise UserError(error.what, where=error.where, fix=error.fix) from error
    except DiskFullError as error:
        raise UserError(str(error), where=str(volume), fix="free some space, or give another volume") from error


def manifest_problems(manifest: Manifest, folder: Path, verify: Verify) -> list[str]:
    """What is missing or damaged; with `sizes`, contents are not read (for volumes too large to hash on every run)."""
    if verify == "sha256":
        return manifest.problems(folder)
    problems = []
    for entry in manifest.files:
        path = folder / entry.path
        size = path.stat().st_size if path.is_file() else None
        if size != entry.bytes:
            problems.append(f"{entry.path}: {'missing' if size is None else f'{size} bytes, expected {entry.bytes}'}")
    return problems
