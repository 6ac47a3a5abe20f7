"""The machine settings of a profile: work pools, processes, and how finished work is verified. Results do not depend on them."""

from typing import Annotated, Self

from pydantic import Field, JsonValue, model_validator

from fvlm_core.config import Positive
from fvlm_core.settings import ProfilePath, Settings
from infra.stack import RENTED_POOL, REPOSITORY
from tasks.rental import Rental
from tasks.steps import OnCodeChange, Verify


class Pool(Settings):
    """A work pool. Another kind of machine is another `type` with its own `job_variables`."""

    name: str
    """The pool's name on the Prefect server."""
    type: str = "process"
    """Prefect's work-pool type. Pools of type `process` get a worker from `speedrun`; others need their own workers."""
    description: str = ""
    """Shown in the Prefect UI."""
    limit: Positive | None = None
    """Maximum number of concurrent flow runs. None: no limit for a new pool; an existing pool keeps its limit."""
    job_variables: dict[str, JsonValue] = Field(default_factory=dict)
    """Infrastructure of a flow run (image, env, volume, ...), as defined by the type. Refer to Prefect blocks instead of giving secrets."""

    @model_validator(mode="after")
    def _job_variables(self) -> Self:
        if self.type == RENTED_POOL:
            from infra.runpod.pool import problems_of  # here, because it imports Prefect, which takes a second

            if problems := problems_of(self.job_variables):
                raise ValueError(f"job_variables: {'; '.join(problems)}")
        return self


class Pools(Settings):
    """Where phases run."""

    cpu: Pool = Pool(name="fvlm-cpu", description="Precompute, reports, and the pipeline itself")
    gpu: Pool = Pool(name="fvlm-gpu", description="Everything that trains or evaluates", limit=1)
    pipeline: Pool | None = None
    """Pool of the pipeline's own flow, which waits for its phases; None: the pool `cpu`. Use a small machine if machines are rented."""

    @property
    def by_role(self) -> dict[str, Pool]:
        """The pools by role."""
        return {"cpu": self.cpu, "gpu": self.gpu, "pipeline": self.pipeline or self.cpu}


class Machine(Settings):
    """How machines are used; results do not depend on it."""

    pools: Pools = Pools()
    """The work pools of the deployments."""
    ranks: Positive = 1
    """Training processes of a stage on each node (the GPUs, or cores, of the machine)."""
    nodes: Positive = 1
    """Machines that train a stage together. The step's log contains the command to start on the others."""
    rendezvous: str | None = None
    """`host:port` of the first node, if there are several."""
    parallel_jobs: Positive = 1
    """Number of concurrent ablation and grid runs. They share the ranks; with several GPUs, each run sees only its own."""
    fork_server: bool = False
    """Whether training runs, and the jobs that follow them in their phase, are forked off one process that has imported torch, which saves
    five CPU seconds each. For many short runs on CPUs; with a GPU or several nodes, torchrun starts them in any case."""
    precompute_workers: Positive = 1
    """Number of flow runs that share the download and the frames of precompute, each on a worker (or a rented machine) of the CPU pool."""
    verify: Verify = "sha256"
    """How finished steps are verified before they are used: by content, or by file sizes only."""
    on_code_change: OnCodeChange = "warn"
    """What to do about results made by other code or library versions: warn in the run and the report, rerun, or ignore."""
    rental: Rental | None = None
    """Rented machines, for pools of the type `runpod`."""
    crash_retries: Annotated[int, Field(ge=0)] = 0
    """How often a phase is restarted after its flow run has crashed (its machine was lost)."""
    min_free_gb: Annotated[float, Field(ge=0)] = 2.0
    """Free space on the volume below which no job starts."""
    stop_grace_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds that a stopped training job has to save its state and end; None: derived from the size of its checkpoints."""
    video2dataset_python: ProfilePath = REPOSITORY / ".venv-video2dataset" / "bin" / "python"
    """Interpreter of video2dataset's environment, made by `infra/video2dataset_env.sh`."""

    @model_validator(mode="after")
    def _meeting_point(self) -> Self:
        if (self.nodes > 1) != (self.rendezvous is not None):
            raise ValueError("rendezvous goes with more than one node: give the first node's host:port")
        return self

    @model_validator(mode="after")
    def _rented_gpus(self) -> Self:
        """Require one process per rented GPU: a GPU without one is paid for nothing, and two do not fit on one GPU."""
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
        """Processes of each concurrent run."""
        return max(1, self.ranks // self.parallel_jobs)
