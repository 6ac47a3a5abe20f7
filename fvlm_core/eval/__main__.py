"""`python -m fvlm_core.eval job.yaml`."""

from fvlm_core.cli import run_job
from fvlm_core.eval.evaluate import evaluate
from fvlm_core.eval.jobs import EvalJob

if __name__ == "__main__":
    run_job(EvalJob, evaluate)
