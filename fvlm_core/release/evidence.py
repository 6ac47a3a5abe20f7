"""The inputs of the report and the card: results, manifests and recipes of the finished steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import Field, JsonValue

from fvlm_core.config import Recipe
from fvlm_core.data.jobs import ShardManifest
from fvlm_core.errors import UserError
from fvlm_core.eval.parts.latency import LatencyResult
from fvlm_core.eval.results import EvalReport, Results
from fvlm_core.experiments import Experiment
from fvlm_core.manifest import AnyManifest, Manifest
from fvlm_core.model.names import MODES, Mode
from fvlm_core.release.jobs import ReleaseJob
from fvlm_core.scaling.runs import FinishedRun
from fvlm_core.train.jobs import MODEL_FOLDER

Kind = TypeVar("Kind", bound=Manifest, covariant=True)


class PhaseRecord(AnyManifest):
    """The part of a phase's manifest that the report reads; `seconds` is the wall-clock time of the run that finished the phase."""

    steps: dict[str, JsonValue]
    """By name."""
    experiments: list[Experiment] = Field(default_factory=list)
    """The phase's entries in the experiment log."""


@dataclass(frozen=True)
class Found(Generic[Kind]):
    """A finished step."""

    folder: Path
    manifest: Kind


@dataclass(frozen=True)
class Evidence:
    """Everything that the phases produced."""

    job: ReleaseJob
    run: FinishedRun
    results: Results
    evaluation: EvalReport
    shards: ShardManifest
    stages: dict[str, FinishedRun]
    """In order; only the released run if the job names no stages."""
    reports: dict[str, Found[AnyManifest]]
    """Every other step, by name."""
    phases: dict[str, PhaseRecord]

    @classmethod
    def read(cls, job: ReleaseJob) -> "Evidence":
        """Read everything that the job names. Raises UserError if anything is missing, damaged, or about another model."""
        run = FinishedRun.read(job.run)
        results = Results.read(job.evaluation)
        weights = [
            entry.sha256
            for entry in run.manifest.files
            if entry.path.startswith(f"{MODEL_FOLDER}/") and entry.path.endswith(".safetensors")
        ]
        if weights != [results.checkpoint]:
            raise UserError(
                "the evaluation is of another checkpoint than the run's",
                where=f"{job.evaluation} and {job.run}",
                fix="evaluate this run, then release it",
            )
        return cls(
            job=job,
            run=run,
            results=results,
            evaluation=EvalReport.read(job.evaluation),
            shards=ShardManifest.read(job.shards),
            stages={name: FinishedRun.read(folder) for name, folder in job.stages.items()} or {run.recipe.name: run},
            reports={name: Found(folder, AnyManifest.read(folder)) for name, folder in job.reports.items()},
            phases={name: PhaseRecord.read(folder) for name, folder in job.phases.items()},
        )

    def report(self, name: str, kind: type[Kind]) -> Found[Kind] | None:
        """The step whose manifest has this name, read in full as a `kind`; None if there is no such step.

        Raises UserError if the manifest is not a valid `kind`.
        """
        found = next((one for one in self.reports.values() if one.manifest.name == name), None)
        return None if found is None else Found(found.folder, kind.read(found.folder))

    @property
    def manifests(self) -> dict[str, Manifest]:
        """Every step that was read, by name."""
        steps: dict[str, Manifest] = {name: one.manifest for name, one in self.reports.items()}
        steps |= {"shards": self.shards}
        steps |= {name: stage.manifest for name, stage in self.stages.items()}
        return steps | {"evaluation": self.evaluation}

    @property
    def other_code(self) -> dict[str, list[str]]:
        """By step, how the current code and libraries differ from those that made it; only steps with differences."""
        return {name: manifest.other_code for name, manifest in self.manifests.items() if manifest.other_code}

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of all manifests that were read."""
        return {name: manifest.digest for name, manifest in {"run": self.run.manifest, **self.manifests}.items()}

    @property
    def recipe(self) -> Recipe:
        """Recipe of the released run."""
        return self.run.recipe

    @property
    def latency(self) -> LatencyResult | None:
        """Latency on the machine of the evaluation, if it was measured."""
        return self.results.part(LatencyResult)

    @property
    def best_mode(self) -> Mode:
        """The default mode: the last one in `MODES` that was evaluated, which is autoregressive (the mode for streams) if possible."""
        return next(mode for mode in reversed(MODES) if mode in self.results.modes)
