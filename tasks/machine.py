"""The part of a profile that is about machines: work pools, processes, how finished work is trusted. Results do not depend on it."""

from typing import Annotated, Self

from pydantic import Field, JsonValue, model_validator

from fvlm_core.config import Positive
from fvlm_core.settings import ProfilePath, Settings
from infra.stack import RENTED_POOL, REPOSITORY
from tasks.rental import Rental
from tasks.steps import OnCodeChange, Verify


class Pool(Settings):
    """A work pool, as data: another kind of machine is another `type` with its own `job_variables`."""

    name: str
    """The pool's name on the Prefect server."""
    type: str = "process"
    """Prefect's work-pool type. Pools of type `process` get a worker from `speedrun`; others have workers of their own."""
    description: str = ""
    """Shown in the Prefect UI."""
    limit: Positive | None = None
    """Flow runs at once; None is no limit for a new pool, and leaves the limit of one that is there."""
    job_variables: dict[str, JsonValue] = Field(default_factory=dict)
    """What a flow run's infrastructure is made of (image, env, volume, ...), as the type defines it. No secrets: name Prefect blocks."""

    @model_validator(mode="after")
    def _job_variables(self) -> Self:
        if self.type == RENTED_POOL:
            from infra.runpod.pool import problems_of  # here: it brings Prefect, which costs a second

            if problems := problems_of(self.job_variables):
                raise ValueError(f"job_variables: {'; '.join(problems)}")
        return self


class Pools(Settings):
    """Where phases run."""

    cpu: Pool = Pool(name="fvlm-cpu", description="Precompute, reports, and the pipeline itself")
    gpu: Pool = Pool(name="fvlm-gpu", description="Everything that trains or evaluates", limit=1)
    pipeline: Pool | None = None
    """Where the pipeline's own flow waits for its phases; None is the pool `cpu`. On rented machines a small one."""

    @property
    def by_role(self) -> dict[str, Pool]:
        """The pools by what they are for."""
        return {"cpu": self.cpu, "gpu": self.gpu, "pipeline": self.pipeline or self.cpu}


class Machine(Settings):
    """How machines are used; results do not depend on it."""

    pools: Pools = Pools()
    """The work pools of the deployments."""
    ranks: Positive = 1
    """Processes of a stage's training on each node (GPUs, or cores, of the machine)."""
    nodes: Positive = 1
    """Machines that train a stage together. The step's log has the command to start on the others."""
    rendezvous: str | None = None
    """`host:port` of the first node, where there are several."""
    parallel_jobs: Positive = 1
    """Ablation and grid runs at once; they share the ranks, and of several GPUs each run sees its own only."""
    fork_server: bool = False
    """Whether training runs, and what their phase runs after them, are forked off one process that has imported torch, which saves each
    five processor seconds. For many short runs on CPUs; where there is a GPU, or several nodes, torchrun starts them all the same."""
    precompute_workers: Positive = 1
    """Flow runs that share the download and the frames of precompute, each on a worker (or a rented machine) of the CPU pool."""
    verify: Verify = "sha256"
    """How finished steps are checked before they are trusted: by content, or by file sizes only."""
    on_code_change: OnCodeChange = "warn"
    """What happens to results made by other code or library versions: warn in the run and the report, rerun, or ignore."""
    rental: Rental | None = None
    """Rented machines, where pools are of the type `runpod`."""
    crash_retries: Annotated[int, Field(ge=0)] = 0
    """How often a phase whose flow run has crashed (its machine was lost) is started again."""
    min_free_gb: Annotated[float, Field(ge=0)] = 2.0
    """Free space on the volume below which no job starts."""
    stop_grace_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds that a training job has to save and end when it is stopped; None: by the size of its checkpoints."""
    video2dataset_python: ProfilePath = REPOSITORY / ".venv-video2dataset" / "bin" / "python"
    """Interpreter of video2dataset's environment, made by `infra/video2dataset_env.sh`."""

    @model_validator(mode="after")
    def _meeting_point(self) -> Self:
        if (self.nodes > 1) != (self.rendezvous is not None):
            raise ValueError("rendezvous goes with more than one node: give the first node's host:port")
        return self

    @model_validator(mode="after")
    def _rented_gpus(self) -> Self:
        """A GPU without a process is paid for and does nothing; two processes on one GPU do not fit."""
        pool = self.pools.gpu
        if pool.type == RENTED_POOL and pool.job_variables.get("gpus"):
            counts = {"pools.gpu.job_variables.gpu_count": pool.job_variables.get("gpu_count", 1), "ranks": self.ranks}
            counts |= {"rental.gpu_count": self.rental.gpu_count} if self.rental else {}
            if len(set(counts.values())) > 1:
                said = ", ".join(f"{name} is {count}" for name, count in counts.items())
                raise ValueError(f"a pod has one process of training on each of its GPUs, but {said}: give the same number")
        return self

    @property
    def shared_ranks(self) -> int:
        """Processes of each of the runs that go on at once."""
        return max(1, self.ranks // self.parallel_jobs)
