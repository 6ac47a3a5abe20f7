"""How to reproduce the release, and how to use the model."""

from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.formatting import fenced
from fvlm_core.release.jobs import HUB_FOLDER, ReleaseJob
from fvlm_core.release.report import Section


def section(evidence: Evidence, figures: Figures) -> Section:
    load = [
        "from transformers import AutoModelForImageTextToText",
        f'model = AutoModelForImageTextToText.from_pretrained("{evidence.job.push_to or HUB_FOLDER}", trust_remote_code=True)',
        f'print(model.answer("clip.mp4", "What is in the video?", mode="{evidence.best_mode}"))',
    ]
    commit = evidence.run.manifest.commit
    again = f"Reproduce this release (the model was trained at commit {commit}):" if commit else "Reproduce this release:"
    blocks = [again, fenced("\n".join(commands(evidence.job)), "sh")]
    return Section(title="Reproduce", blocks=[*blocks, "Use the model:", fenced("\n".join(load), "python")])


def commands(job: ReleaseJob) -> list[str]:
    """The job's commands; by default the pipeline's command with the job's profile."""
    return job.reproduce or [f"./speedrun.sh --profile {job.profile}" if job.profile else "./speedrun.sh"]
