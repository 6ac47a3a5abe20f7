"""The job variables of a work pool of type `runpod`, and the pod that a flow run gets from them."""

import difflib
import ipaddress
import json
import os
import shlex
import time
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit
from uuid import UUID

from prefect.client.schemas.objects import Flow, FlowRun, WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.workers.base import BaseJobConfiguration, BaseVariables
from pydantic import Field, SecretStr, ValidationError, field_validator

from infra.errors import RefusedError
from infra.runpod.account import Place, mounted
from infra.runpod.client import API_URL
from infra.runpod.image import check_image
from infra.runpod.models import MAX_VARIABLES, CpuRequest, GpuRequest, Volume
from infra.runpod.program import START, program
from infra.runpod.rent import Candidate, PodRequirements

PUBLIC_API_VARIABLE = "FVLM_PREFECT_API_URL"
"""Variable of the worker: the URL by which pods reach the Prefect server, if it differs from the worker's own."""
DEFAULT_COMMAND = "{python} -m prefect.engine"
"""The flow's code is already there; Prefect's own default, `prefect flow-run execute`, would copy it first."""
LAST_SAVE_S, LAST_SAVE_SHARE = 600.0, 0.1
"""Time at the end of a pod for the job to save its state, in seconds, and at most this share of the pod's time: a checkpoint of a 1.7B
model takes 440 s (`fvlm_core.train.grace_period`)."""
POLL_S = 15.0
"""Interval between two polls of the list of pods; RunPod allows 60 requests a minute."""
LOCAL_NAMES = ("localhost", ".local", ".internal", ".lan")
"""Suffixes of host names that only resolve on a local network."""
KEPT_OF_PREFECT = (
    "PREFECT__",
    "PREFECT_API_",
    "PREFECT_CLIENT_",
    "PREFECT_FLOWS_",
    "PREFECT_LOGGING_",
    "PREFECT_RESULTS_",
    "PREFECT_TASKS_",
)
"""Prefixes of the worker's own settings that pods get. Those of its server's database and of its folders are not among them."""


def _secret(description: str) -> Any:
    return Field(default=None, description=description)


class RunPodVariables(BaseVariables):
    """Job variables of a pool, a deployment, or a single run."""

    image: str = Field(default="runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404", description="Container image; a digest pins it.")
    gpus: list[str] = Field(default_factory=list, description="GPUs in order of preference, by RunPod's ids; empty: a CPU pod.")
    gpu_count: Annotated[int, Field(ge=1)] = Field(default=1, description="GPUs on the pod.")
    min_cuda: str | None = Field(default=None, description="Lowest CUDA version of the machine, e.g. 12.8.")
    cpus: list[str] = Field(default_factory=list, description="CPU flavours in order of preference, for a pod without a GPU.")
    vcpus: Annotated[int, Field(ge=2)] = Field(default=2, description="vCPUs of a CPU pod, a power of two.")
    disk_gb: Annotated[int, Field(ge=1)] = Field(default=20, description="Size of the container's own disk, which is wiped at every start.")
    volume: str = Field(default="fvlm", description="Name or id of the network volume; `fvlm infra setup` creates it.")
    data_centers: list[str] = Field(
        default_factory=list, description="Data centres that the volume may be in; pods always run in the volume's. Empty: no check."
    )
    mount_path: str = Field(default="/workspace", description="Where the volume is mounted.")
    max_usd_per_hour: Annotated[float, Field(gt=0)] = Field(default=5.0, description="No pod is rented above this price.")
    max_runtime_h: Annotated[float, Field(gt=0)] = Field(default=24.0, description="The pod is ended after this time in any case.")
    capacity_wait_s: Annotated[float, Field(ge=0)] = Field(default=1800.0, description="How long to wait for a free machine.")
    start_timeout_s: Annotated[float, Field(gt=0)] = Field(default=1200.0, description="How long a pod may take to start.")
    idle_gpu_s: Annotated[float, Field(gt=0)] | None = Field(default=3600.0, description="End a pod whose GPUs are idle for this long.")
    silent_s: Annotated[float, Field(gt=0)] | None = Field(default=1800.0, description="End a pod whose run is silent for this long.")
    budget_usd: Annotated[float, Field(gt=0)] = Field(default=500.0, description="Nothing starts that could exceed this total.")
    budget_reserve_usd: Annotated[float, Field(ge=0)] = Field(default=15.0, description="Part of the budget that is held back.")
    code: str | None = Field(default=None, description="Code on the volume, uploaded by `fvlm infra code`; none: the image's.")
    code_folder: str | None = Field(default=None, description="Folder of the code in the image, if `code` is not given.")
    python: str | None = Field(default=None, description="Interpreter in the image; none: an environment on the volume.")
    lock: str = Field(default="requirements.lock", description="Lock file in the code, for the environment on the volume.")
    registry: str | None = Field(default=None, description="Id of RunPod's credentials for a private image.")
    free_volume_gb: Annotated[float, Field(ge=0)] = Field(default=5.0, description="Free space on the volume below which no job starts.")
    runpod_url: str = Field(default=API_URL, description="RunPod's API, or an emulator's.")
    s3_url: str | None = Field(default=None, description="URL of the volume's S3 API; none: RunPod's in the volume's data centre.")
    volume_folder: str | None = Field(default=None, description="Where the worker has the volume mounted; none: it uses S3.")
    poll_s: Annotated[float, Field(gt=0)] = Field(default=POLL_S, description="Interval between two polls of the pods.")
    api_key: SecretStr | None = _secret("RunPod's key, as a Prefect block: {{ prefect.blocks.secret.NAME }}; none: RUNPOD_API_KEY.")
    s3_access_key: str | None = Field(default=None, description="Access key of the volume's S3 API; none: RUNPOD_S3_ACCESS_KEY.")
    s3_secret_key: SecretStr | None = _secret("Secret key of the volume's S3 API, as a Prefect block; none: RUNPOD_S3_SECRET_KEY.")

    @field_validator("vcpus")
    @classmethod
    def _can_be_asked_for(cls, vcpus: int) -> int:
        return CpuRequest(id="any", vcpuCount=vcpus).vcpuCount


def problems_of(job_variables: Mapping[str, object]) -> list[str]:
    """Return what is wrong with the job variables of a pool: invalid values, and unknown names, which Prefect would ignore."""
    known, problems = list(RunPodVariables.model_fields), []
    for name in job_variables:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            problems.append(f"there is no {name}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"))
    try:
        RunPodVariables.model_validate(job_variables)
    except ValidationError as error:
        problems += [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_input=False)]
    return problems


class RunPodConfiguration(BaseJobConfiguration, RunPodVariables):
    """The configuration of a flow run's pod."""

    def prepare_for_flow_run(
        self,
        flow_run: FlowRun,
        deployment: DeploymentResponse | None = None,
        flow: Flow | None = None,
        work_pool: WorkPool | None = None,
        worker_name: str | None = None,
        worker_id: UUID | None = None,
    ) -> None:
        """Fill in what depends on the flow run. Raises RefusedError for too many environment variables."""
        own = set(self.env)
        super().prepare_for_flow_run(flow_run, deployment, flow, work_pool, worker_name, worker_id=worker_id)
        if (public := os.environ.get(PUBLIC_API_VARIABLE)) and "PREFECT_API_URL" not in own:
            self.env["PREFECT_API_URL"] = public
        kept: dict[str, str | None] = {name: value for name, value in self.env.items() if value and (name in own or _for_pods(name))}
        if len(kept) > MAX_VARIABLES - 3:
            raise RefusedError(
                f"{len(kept)} environment variables; a pod takes {MAX_VARIABLES - 3} in addition to its own",
                where="env of the job variables",
                fix="give fewer",
            )
        self.env = kept

    @property
    def place(self) -> Place:
        """The account and its volume, with the keys to both."""
        return Place(
            volume=self.volume,
            runpod_url=self.runpod_url,
            s3_url=self.s3_url,
            folder=self.volume_folder or mounted(self.mount_path, self.volume),
            key=self.api_key,
            s3_access_key=self.s3_access_key,
            s3_secret_key=self.s3_secret_key,
        )

    @property
    def requirements(self) -> PodRequirements:
        """The requested machine."""
        return PodRequirements(
            image=self.image,
            gpus=self.gpus,
            gpu_count=self.gpu_count,
            cpus=self.cpus,
            vcpus=self.vcpus,
            disk_gb=self.disk_gb,
            max_usd_per_hour=self.max_usd_per_hour,
            min_cuda=self.min_cuda,
            data_centers=self.data_centers,
            registry=self.registry,
            args=START,
            env={name: value for name, value in self.env.items() if value is not None} | program(self.runpod_url),
        )

    def job(self, run: UUID, volume: Volume, deadline: float, machine: Candidate) -> str:
        """Return the job of the pod's program, as JSON."""
        command = DEFAULT_COMMAND if self.command in (None, self._base_flow_run_command()) else self.command or ""
        return json.dumps(
            {
                "run": str(run),
                "deadline": deadline,
                "grace_s": min(LAST_SAVE_S, LAST_SAVE_SHARE * (deadline - time.time())),
                "volume": volume.id,
                "mount_path": self.mount_path,
                "command": shlex.split(command),
                "code": self.code,
                "code_folder": self.code_folder,
                "python": self.python,
                "lock": self.lock,
                "gpu": {"id": machine.kind.id, "count": machine.kind.count} if isinstance(machine.kind, GpuRequest) else None,
                "free_volume_gb": self.free_volume_gb,
                "free_disk_gb": 0.5,
            }
        )

    def check_reachable(self) -> None:
        """Raise RefusedError if the Prefect server is on this machine or its local network, where no pod can reach it."""
        url = self.env.get("PREFECT_API_URL") or ""
        if self.runpod_url == API_URL and _only_here(urlsplit(url).hostname or ""):
            raise RefusedError(
                f"the Prefect API at {url} cannot be reached from a pod",
                where="PREFECT_API_URL of the worker",
                fix="use a server that pods can reach: `fvlm infra up`, Prefect Cloud, or any public one",
            )

    def check_image(self) -> None:
        """Raise RefusedError if the registry says that the image cannot be pulled. A registry that does not answer is not an error."""
        if self.runpod_url == API_URL and not self.registry:
            check_image(self.image)


def _only_here(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return (bool(host) and "." not in host) or host.endswith(LOCAL_NAMES)


def _for_pods(name: str) -> bool:
    """Return whether an environment variable of the worker is passed to the run."""
    return not name.startswith("PREFECT_") or name.startswith(KEPT_OF_PREFECT)
