"""What a step is: one job of fvlm_core, its settings, its inputs, and the folder on the volume for its result.

**A step is done when its folder holds a manifest whose files are intact.** Nothing else decides that; Prefect's cache only records it for
the UI. The folder's name ends in a cache key: the hash of the step's settings and of its inputs' digests. A changed setting thus gives a
new folder to that step and to all that depend on it, and to no others. Settings hold no paths: the folders of the inputs are filled in when
the job starts, so that a volume can be moved. This module does not depend on Prefect.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from fvlm_core import dotted
from fvlm_core.errors import UserError
from fvlm_core.manifest import FILE_NAME, AnyManifest, Manifest
from fvlm_core.settings import Settings, hash_json

STEPS = "steps"
"""Folder of the volume that holds a folder per step."""
RECORD = "step.json"
"""File in a step's folder with its settings and inputs, by which a plan explains why another step of this name has to be made."""
KEY_LENGTH = 12
"""Hex digits of a key in folder names: 48 bits, so that no two steps of a volume will ever collide."""
KEY_FORMAT = 1
"""Increased when keys are computed in another way, so that no old folder is mistaken for a new one."""

Verify = Literal["sha256", "sizes"]
OnCodeChange = Literal["warn", "rerun", "ignore"]


class StepResult(Settings):
    """A finished step: where its folder is on the volume, and the digest of what is in it."""

    name: str
    folder: str
    """Relative to the volume."""
    digest: str

    def manifest(self, volume: Path) -> AnyManifest:
        """Return the step's manifest."""
        return AnyManifest.read(volume / self.folder)

    def problems(self, volume: Path, verify: Verify) -> list[str]:
        """Return what is missing, damaged or different from the result that was made; empty if the result is intact."""
        folder = volume / self.folder
        try:
            manifest = AnyManifest.read(folder)
        except UserError as error:
            return [f"{self.folder}: {error.what.splitlines()[0]}"]
        if manifest.digest != self.digest:
            return [f"{self.folder}: it has been made again, with a different result"]
        return [f"{self.folder}/{problem}" for problem in manifest_problems(manifest, folder, verify)]

    def file(self, path: str) -> "File":
        """Return a file in its folder as an input."""
        return File(self, path)


@dataclass(frozen=True)
class ExternalInput:
    """A file or folder outside the volume."""

    path: Path
    digest: str
    """Digest of the content; empty if results do not depend on it, e.g. on the location of a program."""


@dataclass(frozen=True)
class File:
    """A file in the folder of another step's result."""

    of: "Step | StepResult"
    path: str


class StepState(NamedTuple):
    """The state of a step's folder."""

    made: StepResult | None
    """The result, if there is an intact one."""
    reason: str = ""
    """Why the step has to be made, if it has to."""
    other_code: tuple[str, ...] = ()
    """How the code that made the result differs from the current code."""


class StepRecord(Settings):
    """The content of `step.json`."""

    settings: dict[str, Any]
    """Settings that the result depends on."""
    inputs: dict[str, str]
    """Digest of each input by the setting it fills."""


@dataclass(frozen=True)
class Step:
    """One job to run."""

    name: str
    """Task run name and start of the folder's name, e.g. `stage2`."""
    module: str
    """Run as `python -m MODULE job.yaml`, or under torchrun."""
    settings: dict[str, Any]
    """The job's settings, without `output`. The values of settings that inputs fill are ignored."""
    inputs: Mapping[str, "Given"] = field(default_factory=dict)
    """Inputs by dotted path of the setting they fill: a result's folder, a file in it, something outside the volume, or a list of these."""
    identity: dict[str, Any] | None = None
    """The settings that the result depends on; None: all of them."""
    ranks: int = 0
    """Processes of a torchrun job on each node; 0: a plain process. Like the next fields, it does not affect the result or the key."""
    nodes: int = 1
    rendezvous: str | None = None
    """`host:port` of the first node, if there are several."""
    threads: int = 1
    """OMP_NUM_THREADS of the job."""

    @classmethod
    def of(
        cls,
        name: str,
        module: str,
        part: Settings,
        *,
        inputs: "Mapping[str, Given] | None" = None,
        threads: int = 1,
        **more: Any,
    ) -> "Step":
        """Create the step of a job whose settings are a part of the profile and `more`."""
        settings = part.model_dump(mode="json") | more
        return cls(name, module, settings, inputs or {}, identity=part.identity_values() | more, threads=threads)

    @property
    def key(self) -> str:
        """Cache key of the result, known before the result is made. All inputs must have been made."""
        outside = {path: one.digest for path, one in self._flat_inputs() if isinstance(one, ExternalInput) and one.digest}
        made = {path: digest for path, digest in self.input_digests().items() if path not in outside}
        return hash_json([self.name, self.module, KEY_FORMAT, self._own_settings, made, outside])[:KEY_LENGTH]

    @property
    def folder(self) -> str:
        """Folder of the result, relative to the volume."""
        return f"{STEPS}/{self.name}-{self.key}"

    @property
    def record(self) -> StepRecord:
        """The settings and inputs that its result is made from."""
        return StepRecord(settings=self._own_settings, inputs=self.input_digests())

    @property
    def _own_settings(self) -> dict[str, Any]:
        """The settings that its result depends on, without inputs."""
        given = self.identity if self.identity is not None else self.settings
        return {name: value for name, value in given.items() if name not in self.inputs}

    @property
    def needs(self) -> "list[Step]":
        """The inputs that are not made yet, and so are still steps."""
        return [one for _, given in self._flat_inputs() if isinstance(one := given.of if isinstance(given, File) else given, Step)]

    def bound(self, made: Mapping[str, StepResult]) -> "Step":
        """Return the step with `made`, the results by step name, in place of the steps among its inputs. Other inputs stay."""

        def bind(one: "Input") -> "Input":
            if isinstance(one, File):
                return File(made.get(one.of.name, one.of), one.path)
            return made.get(one.name, one) if isinstance(one, Step) else one

        inputs = {path: [bind(one) for one in given] if isinstance(given, Sequence) else bind(given) for path, given in self.inputs.items()}
        return replace(self, inputs=inputs)

    def lock(self, volume: Path) -> Path:
        """Return the path of the lock that the process that writes its folder holds."""
        return volume / STEPS / ".locks" / Path(self.folder).name

    def file(self, path: str) -> File:
        """Return a file in its folder as an input."""
        return File(self, path)

    def input_digests(self) -> dict[str, str]:
        """Return the digest of each input by the setting it fills; for a file of a result, with the file's path."""
        digests = {}
        for path, given in self._flat_inputs():
            source = given.of if isinstance(given, File) else given
            if isinstance(source, Step):
                raise RuntimeError(f"{self.name} needs {source.name}, which has not been made")
            if source.digest:
                digests[path] = f"{source.digest}/{given.path}" if isinstance(given, File) else source.digest
        return digests

    def job_settings(self, volume: Path) -> dict[str, Any]:
        """Return the settings with `output` and every input as absolute paths."""
        paths = {
            path: [_place(one, volume) for one in given] if isinstance(given, Sequence) else _place(given, volume)
            for path, given in self.inputs.items()
        }
        top = {path: value for path, value in paths.items() if "." not in path}
        deep = {path: value for path, value in paths.items() if "." in path}
        return {"output": str(volume / self.folder)} | dotted.with_changes(self.settings, deep) | top

    def find(self, volume: Path, verify: Verify, on_code_change: OnCodeChange = "warn") -> StepState:
        """Look for an intact result in the step's folder."""
        folder = volume / self.folder
        if not (folder / FILE_NAME).is_file():
            return StepState(None, "not made yet" if not folder.exists() else "begun, not finished")
        made = self.result(volume)
        if made is None:
            return StepState(None, "damaged: its manifest cannot be read")
        if problems := made.problems(volume, verify):
            return StepState(None, f"damaged: {'; '.join(problems[:3])}")
        other = () if on_code_change == "ignore" else tuple(made.manifest(volume).other_code)
        if other and on_code_change == "rerun":
            return StepState(None, f"made by other code: {'; '.join(other[:3])}")
        return StepState(made, other_code=other)

    def result(self, volume: Path) -> StepResult | None:
        """Return the result according to the folder's manifest, without checking its files; None if the manifest cannot be read."""
        try:
            return StepResult(name=self.name, folder=self.folder, digest=AnyManifest.read(volume / self.folder).digest)
        except UserError:
            return None

    def _flat_inputs(self) -> "Iterator[tuple[str, Input]]":
        for path, given in self.inputs.items():
            if isinstance(given, Sequence):
                yield from ((f"{path}.{number}", one) for number, one in enumerate(given))
            else:
                yield path, given


Input = Step | StepResult | ExternalInput | File
Given = Input | Sequence[Input]
"""What fills a setting."""


def in_dependency_order(steps: list[Step]) -> Iterator[list[Step]]:
    """Yield the steps in groups that only need results of earlier groups. Raises ValueError for circular dependencies."""
    left, names = list(steps), {step.name for step in steps}
    done: set[str] = set()
    while left:
        ready = [step for step in left if all(need.name in done or need.name not in names for need in step.needs)]
        if not ready:
            raise ValueError(f"these steps wait for each other: {', '.join(step.name for step in left)}")
        yield ready
        done |= {step.name for step in ready}
        left = [step for step in left if step.name not in done]


def read_record(folder: Path) -> StepRecord | None:
    """Return the record of the step in `folder`, or None if there is none."""
    try:
        return StepRecord.model_validate_json((folder / RECORD).read_bytes())
    except (OSError, ValidationError):
        return None


def manifest_problems(manifest: Manifest, folder: Path, verify: Verify) -> list[str]:
    """Return what is missing or damaged. With `sizes`, contents are not read, for volumes that are too large to hash on every run."""
    if verify == "sha256":
        return manifest.problems(folder)
    problems = []
    for entry in manifest.files:
        path = folder / entry.path
        size = path.stat().st_size if path.is_file() else None
        if size != entry.bytes:
            problems.append(f"{entry.path}: {'missing' if size is None else f'{size} bytes, expected {entry.bytes}'}")
    return problems


def _place(given: Input, volume: Path) -> str:
    """The absolute path of an input."""
    if isinstance(given, ExternalInput):
        return str(given.path)
    if isinstance(given, File):
        return f"{_place(given.of, volume)}/{given.path}"
    return str(volume / given.folder)
