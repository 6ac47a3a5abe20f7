"""Prefect's command, for a worker of the pool type `runpod` with shorter waits."""

import runpy

from infra.runpod import worker

if __name__ == "__main__":
    worker.CANCEL_S, worker.RECOVER_S = 3.0, 3.0
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)
