"""The settings of a profile for rented machines: where they are, what they cost, and what a plan assumes until there are measurements."""

from typing import Annotated, Any

from pydantic import Field, JsonValue

from fvlm_core.settings import Settings
from fvlm_core.train.expected import MeanSample

Usd = Annotated[float, Field(ge=0)]
Hours = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class Mfu(Settings):
    """Model FLOPs utilization (MFU): the share of the GPUs' peak that training reaches. The plan's interval goes from `low` to `high`."""

    low: Share = 0.15
    """MFU for the plan's upper bound: slower training costs more."""
    expected: Share = 0.25
    """MFU for the plan's expected cost."""
    high: Share = 0.40
    """MFU for the plan's lower bound."""


class Assumed(Settings):
    """Assumptions of a plan in dollars until there are measurements on the volume."""

    mfu: Mfu = Mfu()
    peak_tflops: Annotated[float, Field(gt=0)] = 312.0
    """Peak TFLOPS of one GPU in the precision of the training; the default is an A100 in bf16."""
    samples: dict[str, MeanSample] = Field(default_factory=dict)
    """Mean sample of each source, used until there are shards."""
    hours: dict[str, Hours] = Field(default_factory=dict)
    """Pod hours of the steps that do not train, by prefix of the step's name."""
    start_h: Hours = 0.15
    """Hours until a pod has started and its first environment is created."""


class Rental(Settings):
    """Rented machines: RunPod's, or an emulator's. Results do not depend on it."""

    volume: str = "fvlm"
    """Name of the network volume."""
    volume_gb: Annotated[int, Field(ge=10, le=4096)] = 500
    """Size of the volume in GB."""
    data_centers: list[str] = Field(default_factory=lambda: ["US-KS-2", "US-GA-2", "EU-RO-1", "EUR-IS-1"])
    """Where the volume may be, in order of preference; all must have an S3 API. Pods run where the volume is."""
    mount_path: str = "/workspace"
    """Where pods mount the volume."""
    cap_usd: Usd = 500.0
    """Spending cap: nothing starts that could exceed it."""
    reserve_usd: Usd = 15.0
    """Part of the cap that is held back for storage after the last pod and for late bills."""
    days: Annotated[float, Field(gt=0)] = 30.0
    """Days for which the plan includes the cost of the volume."""
    gpu_usd_per_hour: Usd = 3.28
    """Price of a GPU pod in the plan."""
    gpu_count: Annotated[int, Field(ge=1)] = 2
    """Number of GPUs of a GPU pod."""
    cpu_usd_per_hour: Usd = 0.96
    """Price of a pod for precompute in the plan."""
    pipeline_usd_per_hour: Usd = 0.06
    """Price, in the plan, of the small pod on which the pipeline's own flow waits."""
    runpod_url: str = "https://api.runpod.io"
    """URL of RunPod's API, or of an emulator."""
    s3_url: str | None = None
    """URL of the volume's S3 API; None: RunPod's in the volume's data centre."""
    server_port: Annotated[int, Field(gt=0, lt=65536)] = 4200
    """Port of the Prefect server that `fvlm infra up` starts on a pod."""
    server_address: str = "https://{pod}-{port}.proxy.runpod.net"
    """URL by which that server is reached from outside; the default is RunPod's proxy."""
    server_days: Annotated[float, Field(gt=0)] = 7.0
    """Maximum time, in days, for which that server runs."""
    assumed: Assumed = Assumed()

    def address_of(self, pod: str) -> str:
        """Return the URL of the Prefect server on a pod."""
        return self.server_address.format(pod=pod, port=self.server_port)

    def job_variables(self, code: str | None) -> dict[str, Any]:
        """Return the job variables of every pool of type `runpod`; a pool's own job variables override them."""
        given: dict[str, JsonValue] = {
            "volume": self.volume,
            "data_centers": list(self.data_centers),
            "mount_path": self.mount_path,
            "budget_usd": self.cap_usd,
            "budget_reserve_usd": self.reserve_usd,
            "runpod_url": self.runpod_url,
            "s3_url": self.s3_url,
            "code": code,
        }
        return {name: value for name, value in given.items() if value is not None}
