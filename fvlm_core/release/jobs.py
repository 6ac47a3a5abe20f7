"""Settings and manifest of `python -m fvlm_core.release job.yaml`; light to import."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from fvlm_core.config import Positive
from fvlm_core.manifest import Manifest
from fvlm_core.settings import EXECUTION, Settings

HUB_FOLDER = "model"
CARD_FILE = f"{HUB_FOLDER}/README.md"
PUSH_PLAN = "push.txt"
REPORT_JSON, REPORT_HTML, REPORT_TEXT, BLOG = "report.json", "report.html", "report.md", "blog.md"


class ReleaseSettings(Settings):
    """How the release is named and described."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The model's name, e.g. `fVLM-135M`."""
    license: str = "apache-2.0"
    """Identifier that the hub knows."""
    language: list[str] = Field(default_factory=lambda: ["en"])
    """Languages of the data, as the model card names them."""
    summary: str = ""
    """Sentences for the top of the card, after the generated ones."""
    limitations: list[str] = Field(default_factory=list)
    """Added to the generated ones."""
    reproduce: Annotated[list[str], EXECUTION] = Field(default_factory=list)
    """Commands that make this release again; empty for the pipeline's own command with the profile that was used."""
    usd_per_hour: Annotated[float, Field(ge=0)] | None = None
    """Price of the machine, for the cost table; None says only times."""
    verify_samples: Positive = 8
    """Validation samples whose logits must be equal in a clean process before anything is released."""
    push_to: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """`owner/name` on the hub, as the card names it. What would be sent there is listed in `push.txt`."""
    push: bool = False
    """Send it, as a private repository, where a token is given; `fvlm push` does it later."""

    @model_validator(mode="after")
    def _push_somewhere(self) -> Self:
        if self.push and self.push_to is None:
            raise ValueError("push needs push_to: name the repository, OWNER/NAME")
        return self


class ReleaseJob(ReleaseSettings):
    """Package one trained and evaluated run."""

    output: Path
    """Gets `model/` (ready to push), `report.html`, `report.md`, `report.json`, `blog.md`, `manifest.json`."""
    run: Path
    """Folder of the finished training run."""
    evaluation: Path
    """Folder of its EvalReport."""
    shards: Path
    """Folder of the ShardManifest it was trained on."""
    stages: dict[str, Path] = Field(default_factory=dict)
    """Folders of the training stages by name, in their order; the last is usually `run`."""
    reports: dict[str, Path] = Field(default_factory=dict)
    """Folders of all other steps that the report may show or counts the time of, by name. What a step is, its manifest says."""
    phases: dict[str, Path] = Field(default_factory=dict)
    """Folders of the phases' own manifests by name, in their order: the wall-clock time of each, and which steps it has."""
    profile: str = ""
    """Name of the pipeline's profile, for the report."""


class ReleaseManifest(Manifest):
    """A released model: `model/` is its identity, the report (which has times) is not."""

    verdict: str
    """One line: does looking help?"""
    outputs: dict[str, str]
    """What a user looks for, `model` and `report`: paths relative to the manifest's folder."""
    verified: dict[str, int]
    """Per mode, the number of logits that a clean process computed and found equal, bit for bit."""
    pushed_to: str | None = None
    """URL of the hub repository; None where nothing was sent."""
    missing: list[str] = Field(default_factory=list)
    """Titles of the report's sections that have nothing to show."""
