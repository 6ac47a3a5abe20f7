"""`python -m fvlm_core.release job.yaml`; reads HF_TOKEN and HF_ENDPOINT from the environment."""

import os

from fvlm_core.cli import run_job
from fvlm_core.release.jobs import ReleaseJob
from fvlm_core.release.release import release

if __name__ == "__main__":
    run_job(ReleaseJob, lambda job: release(job, token=os.environ.get("HF_TOKEN"), endpoint=os.environ.get("HF_ENDPOINT")))
