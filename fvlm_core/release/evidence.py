"""Everything a report and a card draw from, read once: results, manifests, recipes, and what is missing."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fvlm_core.config import Recipe
from fvlm_core.data.jobs import ShardManifest
from fvlm_core.errors import UserError
from fvlm_core.eval.results import LATENCY_FILE, MODES, EvalReport, Latency, Mode, Results
from fvlm_core.manifest import AnyManifest, Manifest
from fvlm_core.model.foveated import WEIGHTS_FILE
from fvlm_core.release.jobs import PhaseFolders, ReleaseJob
from fvlm_core.scaling.grid import Fits
from fvlm_core.scaling.jobs import FITS_FILE, AblationReport, ScalingReport
from fvlm_core.scaling.runs import FinishedRun
from fvlm_core.train.jobs import MODEL_FOLDER, SpeedReport

AnyReport = TypeVar("AnyReport", bound=Manifest)
STAGES = ("stage1", "stage2", "stage3")


@dataclass(frozen=True)
class Evidence:
    """What the phases left."""

    job: ReleaseJob
    run: FinishedRun
    results: Results
    evaluation: EvalReport
    latency: Latency | None
    shards: ShardManifest
    precompute: list[Manifest]
    speed: SpeedReport | None
    ablations: AblationReport | None
    scaling: ScalingReport | None
    fits: Fits | None
    stages: dict[str, FinishedRun]
    """Those that ran, in order."""
    missing: list[str] = field(default_factory=list)
    """Optional parts that are not there."""

    @classmethod
    def read(cls, job: ReleaseJob) -> "Evidence":
        """Raises UserError for anything named in the job that is missing, damaged, or about another model."""
        run = FinishedRun.read(job.run)
        results = Results.read(job.evaluation)
        weights = next((entry.sha256 for entry in run.manifest.files if entry.path == f"{MODEL_FOLDER}/{WEIGHTS_FILE}"), None)
        if results.checkpoint != weights:
            raise UserError(
                "the evaluation is of another checkpoint than the run's",
                where=f"{job.evaluation} and {job.run}",
                fix="evaluate this run, then release it",
            )
        latency = job.evaluation / LATENCY_FILE
        folders = job.reports
        return cls(
            job=job,
            run=run,
            results=results,
            evaluation=EvalReport.read(job.evaluation),
            latency=Latency.model_validate_json(latency.read_text()) if latency.is_file() else None,
            shards=ShardManifest.read(job.shards),
            precompute=[AnyManifest.read(folder) for folder in folders.precompute],
            speed=_read(SpeedReport, folders.speed),
            ablations=_read(AblationReport, folders.ablations),
            scaling=_read(ScalingReport, folders.scaling),
            fits=None if folders.scaling is None else Fits.from_yaml(folders.scaling / FITS_FILE),  # JSON is YAML
            stages={name: FinishedRun.read(folder) for name in STAGES if (folder := getattr(folders, name)) is not None},
            missing=[name for name in PhaseFolders.model_fields if not getattr(folders, name)],
        )

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of everything that was read."""
        named: dict[str, Manifest | None] = {
            "run": self.run.manifest,
            "evaluation": self.evaluation,
            "shards": self.shards,
            "speed": self.speed,
            "ablations": self.ablations,
            "scaling": self.scaling,
        }
        named |= {name: stage.manifest for name, stage in self.stages.items()}
        named |= {manifest.name: manifest for manifest in self.precompute}
        return {name: manifest.digest for name, manifest in named.items() if manifest is not None}

    @property
    def recipe(self) -> Recipe:
        """Of the released run."""
        return self.run.recipe

    @property
    def best_mode(self) -> Mode:
        """The mode to use where nothing else is said: autoregressive, which is what a stream can do, if the model has it."""
        return next(mode for mode in reversed(MODES) if mode in self.results.modes)


def _read(report: type[AnyReport], folder: Path | None) -> AnyReport | None:
    return None if folder is None else report.read(folder)
