"""How to make this release again, and how to use it."""

from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.jobs import HUB_FOLDER, ReleaseJob
from fvlm_core.release.report import Section
from fvlm_core.release.words import fenced


def section(evidence: Evidence, figures: Figures) -> Section:
    load = [
        "from transformers import AutoModelForImageTextToText",
        f'model = AutoModelForImageTextToText.from_pretrained("{evidence.job.push_to or HUB_FOLDER}", trust_remote_code=True)',
        f'print(model.answer("clip.mp4", "What is in the video?", mode="{evidence.best_mode}"))',
    ]
    commit = evidence.run.manifest.commit
    again = f"Make this release again (the model was trained at the commit {commit}):" if commit else "Make this release again:"
    blocks = [again, fenced("\n".join(commands(evidence.job)), "sh")]
    return Section(title="Reproduce", blocks=[*blocks, "Use the model:", fenced("\n".join(load), "python")])


def commands(job: ReleaseJob) -> list[str]:
    """Those of the job; otherwise the pipeline's with the profile of that name."""
    return job.reproduce or [f"./speedrun.sh --profile {job.profile}" if job.profile else "./speedrun.sh"]
