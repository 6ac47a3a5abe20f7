"""Settings and manifest of `python -m fvlm_core.release job.yaml`; fast to import."""

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
    """Licence identifier on the hub."""
    language: list[str] = Field(default_factory=lambda: ["en"])
    """Languages of the data, as codes for the model card."""
    summary: str = ""
    """Text for the top of the card, after the generated introduction."""
    limitations: list[str] = Field(default_factory=list)
    """Limitations to add to the generated ones."""
    reproduce: Annotated[list[str], EXECUTION] = Field(default_factory=list)
    """Commands that reproduce this release; by default the pipeline's own command with the profile that was used."""
    usd_per_hour: Annotated[float, Field(ge=0)] | None = None
    """Price of the machine, for the cost table; without it the table shows only times."""
    verify_samples: Positive = 8
    """Validation samples whose logits must be equal in a clean process before anything is released."""
    push_to: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """`owner/name` on the hub; the card uses it, and `push.txt` lists the files to upload."""
    push: bool = False
    """Push the release to a private repository, if HF_TOKEN is set; `fvlm push` can do so later."""

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
    """Folder of its evaluation."""
    shards: Path
    """Folder of the shards it was trained on."""
    stages: dict[str, Path] = Field(default_factory=dict)
    """Folders of the training stages by name, in order; the last is usually `run`."""
    reports: dict[str, Path] = Field(default_factory=dict)
    """Folders, by name, of all other steps whose results or times the report shows. A step's manifest says what kind of step it is."""
    phases: dict[str, Path] = Field(default_factory=dict)
    """Folders of the phases' manifests by name, in order. They give each phase's wall-clock time and steps."""
    profile: str = ""
    """Name of the pipeline's profile, for the report."""


class ReleaseManifest(Manifest):
    """A released model. Its identity is that of `model/`, not of the report, which contains times."""

    verdict: str
    """One line: does looking help?"""
    outputs: dict[str, str]
    """Paths of `model` and `report`, relative to the manifest's folder."""
    verified: dict[str, int]
    """Per mode, the number of logits that a clean process computed and found equal, bit for bit."""
    pushed_to: str | None = None
    """URL of the hub repository; None if the release was not pushed."""
    missing: list[str] = Field(default_factory=list)
    """Titles of the report's sections without content."""
