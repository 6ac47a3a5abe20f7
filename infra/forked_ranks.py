"""A torchrun for one machine whose ranks are forked: `python -m infra.forked_ranks RANKS MODULE SETTINGS`.

It uses torchrun's launcher with torchrun's settings, but forks the ranks. torchrun starts a new Python process for each, which imports
everything again; a process forked off a fork server has already imported everything. If there is a GPU, this hands over to torchrun,
because a process that has queried a GPU must not fork processes that use it.
"""

import multiprocessing
import os
import signal
import sys
import uuid
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from infra.fork_server import own_process
from infra.launch import torchrun_job
from infra.start import run


@record
def main() -> None:
    """Run the module on every rank until all have ended. If one rank fails, the others are ended and the exit status is 1."""
    ranks, module, settings = sys.argv[1:]
    if torch.cuda.is_available():
        command = torchrun_job(module, Path(settings), processes=int(ranks))
        os.execv(command[0], command)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(ranks),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    try:
        elastic_launch(config, rank)([module, settings])
    except SignalException:
        for child in multiprocessing.active_children():  # ranks that torch had not registered yet when the signal came
            child.terminate()
        raise


def rank(command: list[str]) -> None:
    """Run the module as `__main__` in a rank. It returns on success, because torch waits forever for a rank that exits with status 0."""
    own_process("fvlm-rank")
    os.setsid()
    try:
        run(command)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    main()
