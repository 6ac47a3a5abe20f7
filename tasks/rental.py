"""The part of a profile that is about rented machines: where, for how much, and what a plan assumes as long as nothing is measured."""

from typing import Annotated, Any

from pydantic import Field, JsonValue

from fvlm_core.settings import Settings
from fvlm_core.train.expected import MeanSample

Usd = Annotated[float, Field(ge=0)]
Hours = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class Mfu(Settings):
    """Share of the GPUs' peak that training reaches: the plan's interval goes from `low` to `high`."""

    low: Share = 0.15
    """Of the plan's upper bound: slower training costs more."""
    expected: Share = 0.25
    """Of the plan's expected cost."""
    high: Share = 0.40
    """Of the plan's lower bound."""


class Assumed(Settings):
    """What a plan in dollars assumes as long as nothing was measured on the volume."""

    mfu: Mfu = Mfu()
    peak_tflops: Annotated[float, Field(gt=0)] = 312.0
    """Of one GPU, in the training's precision; an A100 in bf16."""
    samples: dict[str, MeanSample] = Field(default_factory=dict)
    """A mean sample of each source, until the shards say."""
    hours: dict[str, Hours] = Field(default_factory=dict)
    """Hours on its pod of a step that does not train, by the beginning of its name."""
    start_h: Hours = 0.15
    """Of every pod: until it is there, and its first environment is made."""


class Rental(Settings):
    """Rented machines: RunPod's, or an emulator's. Results do not depend on it."""

    volume: str = "fvlm"
    """Name of the network volume."""
    volume_gb: Annotated[int, Field(ge=10, le=4096)] = 500
    """Its size in GB."""
    data_centers: list[str] = Field(default_factory=lambda: ["US-KS-2", "US-GA-2", "EU-RO-1", "EUR-IS-1"])
    """Where the volume may be, the most wanted first; all must have an S3 side. Pods are where the volume is."""
    mount_path: str = "/workspace"
    """Where pods see the volume."""
    cap_usd: Usd = 500.0
    """Nothing starts that could pass this sum."""
    reserve_usd: Usd = 15.0
    """Part of it that stays untouched: storage after the last pod, late bills."""
    days: Annotated[float, Field(gt=0)] = 30.0
    """How long the volume is kept, in the plan."""
    gpu_usd_per_hour: Usd = 3.28
    """Of a GPU pod, in the plan."""
    gpu_count: Annotated[int, Field(ge=1)] = 2
    """GPUs of a GPU pod."""
    cpu_usd_per_hour: Usd = 0.96
    """Of a pod for precompute."""
    pipeline_usd_per_hour: Usd = 0.06
    """Of the small pod that the pipeline's own flow waits on."""
    runpod_url: str = "https://api.runpod.io"
    """Address of RunPod's API, or of an emulator's."""
    s3_url: str | None = None
    """The volume's S3 side; None is RunPod's in the volume's data centre."""
    server_port: Annotated[int, Field(gt=0, lt=65536)] = 4200
    """Of the Prefect server that `fvlm infra up` starts on a pod."""
    server_address: str = "https://{pod}-{port}.proxy.runpod.net"
    """By which that server is reached from outside: RunPod's proxy."""
    server_days: Annotated[float, Field(gt=0)] = 7.0
    """How long that server runs at the longest, unless it is ended before."""
    assumed: Assumed = Assumed()

    def address_of(self, pod: str) -> str:
        """Of the Prefect server on that pod."""
        return self.server_address.format(pod=pod, port=self.server_port)

    def job_variables(self, code: str | None) -> dict[str, Any]:
        """What every pool of type `runpod` gets; a pool's own job variables override it."""
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
