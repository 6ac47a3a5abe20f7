"""torchrun on one machine, with ranks that are forked: `python -m infra.forked_ranks RANKS MODULE SETTINGS`.

It is the launcher that torchrun is, with torchrun's settings, but for the start of a rank: torchrun starts a Python for each, which
imports everything again. Where this runs off a fork server, everything is imported already. Where there is a GPU, torchrun takes over:
what asks for a GPU must not fork processes that use it.
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
    """Run the module on every rank, and end when all have; a rank that fails ends the others, and this with status 1."""
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
        for child in multiprocessing.active_children():  # those that torch did not know of yet when the signal came
            child.terminate()
        raise


def rank(command: list[str]) -> None:
    """What a rank does: the module, as the main one. torch waits for ever for one that ends well without returning."""
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
