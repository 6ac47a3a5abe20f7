"""`python -m fvlm_core.eval job.yaml`, or the same under torchrun."""

import os

from fvlm_core.cli import run_job
from fvlm_core.eval.evaluate import evaluate
from fvlm_core.eval.jobs import EvalJob
from fvlm_core.eval.ranks import Ranks

if __name__ == "__main__":
    run_job(EvalJob, lambda job: evaluate(job, Ranks.of(os.environ)))
