"""torchrun on one machine, with ranks that are forked: `python -m infra.forked_ranks RANKS MODULE ARGUMENTS...`.

It is the launcher that torchrun is, with torchrun's settings, but for the start of a rank: torchrun starts a Python for each, which
imports everything again. Where this runs off a fork server, everything is imported already.
"""

import sys
import uuid

from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from infra.fork_server import own_process
from infra.start import run


@record
def main() -> None:
    """Run the module on every rank, and end when all have; a rank that fails ends the others, and this with status 1."""
    ranks, *command = sys.argv[1:]
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
    elastic_launch(config, rank)(command)


def rank(command: list[str]) -> None:
    """What a rank does: the module, as the main one."""
    own_process("fvlm-rank")
    run(command)


if __name__ == "__main__":
    main()
