"""Settings and manifest of `python -m fvlm_core.release job.yaml`; light to import."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from fvlm_core.config import Positive
from fvlm_core.manifest import Manifest
from fvlm_core.settings import Settings

HUB_FOLDER = "model"
CARD_FILE = f"{HUB_FOLDER}/README.md"
REPORT_JSON, REPORT_HTML, REPORT_TEXT = "report.json", "report.html", "report.md"


class PhaseFolders(Settings):
    """Folders of the phases' results; None for a phase that did not run, which the report then names as missing."""

    precompute: list[Path] = Field(default_factory=list)
    """Folders of all steps before the shards (clips, downloads), for their times."""
    speed: Path | None = None
    ablations: Path | None = None
    scaling: Path | None = None
    stage1: Path | None = None
    stage2: Path | None = None
    stage3: Path | None = None


class ReleaseSettings(Settings):
    """How the release is named and described."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The model's name, e.g. `fVLM-135M`."""
    license: str = "apache-2.0"
    """Identifier that the hub knows."""
    language: list[str] = Field(default_factory=lambda: ["en"])
    summary: str = ""
    """Sentences for the top of the card, after the generated ones."""
    limitations: list[str] = Field(default_factory=list)
    """Added to the generated ones."""
    reproduce: list[str] = Field(default_factory=lambda: ["./speedrun.sh"])
    """Commands that make this release again."""
    usd_per_hour: Annotated[float, Field(ge=0)] | None = None
    """Price of the machine, for the cost table; None says only times."""
    verify_samples: Positive = 8
    """Validation samples whose logits must be equal in a clean process before anything is released."""
    push_to: str | None = None
    """`owner/name` on the hub; pushed as a private repository, and only where a token is given."""


class ReleaseJob(ReleaseSettings):
    """Package one trained and evaluated run."""

    output: Path
    """Gets `model/` (ready to push), `report.html`, `report.md`, `report.json`, `manifest.json`."""
    run: Path
    """Folder of the finished training run."""
    evaluation: Path
    """Folder of its EvalReport."""
    shards: Path
    """Folder of the ShardManifest it was trained on."""
    reports: PhaseFolders = PhaseFolders()
    profile: str = ""
    """Name of the pipeline's profile, for the report."""


class ReleaseManifest(Manifest):
    """A released model: `model/` is its identity, the report (which has times) is not."""

    verdict: str
    """One line: does looking help?"""
    verified: dict[str, int]
    """Per mode, the number of logits that a clean process computed and found equal, bit for bit."""
    pushed_to: str | None = None
    """URL of the hub repository; None where nothing was sent."""
    missing: list[str] = Field(default_factory=list)
    """Optional parts that the report lacks."""
