"""Settings of `python -m fvlm_core.eval job.yaml`: every part's own (`parts/`), and what they share."""

from pathlib import Path
from typing import Annotated, Literal

from fvlm_core.config import Positive
from fvlm_core.eval.part import Count
from fvlm_core.eval.parts import Parts
from fvlm_core.model.names import Mode
from fvlm_core.settings import EXECUTION


class EvalSettings(Parts):
    """What a model is evaluated on."""

    modes: list[Mode] | None = None
    """Modes to evaluate; None is every mode the model has."""
    resamples: Positive = 1000
    """Bootstrap resamples of every interval."""
    seed: int = 0
    """Of everything that is drawn: bootstrap resamples, distractors of questions, random queries."""
    batch_samples: Annotated[Positive, EXECUTION] = 64
    """Sequences in a packed batch (an option of a question is one sequence). Another number of them sums in another order, which can
    change the sixth decimal of a result, and an answer only where two are equally likely to that precision."""
    threads: Annotated[Count, EXECUTION] = 1
    """torch CPU threads; 0 leaves torch's default. Latency, which depends on it, is no part of the evaluation's identity."""
    device: Annotated[Literal["auto", "cpu", "cuda"], EXECUTION] = "auto"
    """auto: a GPU where there is one."""

    def outside(self) -> dict[tuple[str, str], Path]:
        """Files and folders from outside that the evaluation reads, by part and setting: to be there before anything starts, and part of
        its identity."""
        return {(name, file): path for name, part in self.parts().items() for file, path in part.outside().items()}


class EvalJob(EvalSettings):
    """One evaluation of one trained run on the fixed validation split."""

    output: Path
    """Folder of the report: `results.json`, `timings.json`, `tables.md`, pictures, `manifest.json`."""
    run: Path
    """Folder of a finished training run; its `model/` is evaluated."""
    shards: Path
    """Folder of a ShardManifest."""
