"""Requests to RunPod's API v2 and its responses, as far as they are used here.

Requests forbid unknown fields, so that a wrong one is found here and not by a status 422. Responses allow them, because the service adds
fields between versions. Names are the API's own. Source: its OpenAPI document, version 2.0.0 (service 2.9.0, 18 Aug 2026).
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_VARIABLES = 50
"""Maximum number of environment variables of a pod."""
HOURS_PER_MONTH = 730.0
"""By which RunPod converts a price per month into one per hour; a month of 30.4 days."""


class Status(StrEnum):
    """State of a pod."""

    PROVISIONING = "PROVISIONING"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    EXITED = "EXITED"
    ERROR = "ERROR"
    TERMINATED = "TERMINATED"


OVER = frozenset({Status.EXITED, Status.ERROR, Status.TERMINATED})
"""States that a pod does not leave by itself."""


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Reply(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class GpuRequest(Request):
    id: str
    count: Annotated[int, Field(ge=1)] = 1
    minCudaVersion: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+$")] | None = None  # noqa: N815


class CpuRequest(Request):
    id: Annotated[str, Field(min_length=1)]
    vcpuCount: Annotated[int, Field(ge=2)]  # noqa: N815

    @model_validator(mode="after")
    def _power_of_two(self) -> Self:
        if self.vcpuCount & (self.vcpuCount - 1):
            raise ValueError(f"vcpuCount is {self.vcpuCount}; RunPod takes powers of two")
        return self


class NetworkMount(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    volumeId: str  # noqa: N815
    path: str


class Mounts(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    network: Annotated[list[NetworkMount], Field(max_length=1)] = Field(default_factory=list)


class CreatePod(Request):
    """The body of `POST /v2/pods`."""

    name: Annotated[str, Field(min_length=1)]
    image: str
    args: str = ""
    """The container's command, as one string with shell quoting."""
    env: Annotated[dict[str, str], Field(max_length=MAX_VARIABLES, repr=False)] = Field(default_factory=dict)
    disk: Annotated[int, Field(ge=1)] = 20
    """GB; wiped at every restart of the container."""
    gpu: GpuRequest | None = None
    cpu: CpuRequest | None = None
    mounts: Mounts | None = None
    dataCenterIds: list[str] | None = None  # noqa: N815
    ports: list[str] | None = None
    registry: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.gpu is None) == (self.cpu is None):
            raise ValueError("exactly one of gpu and cpu")
        return self


class Gpu(Reply):
    id: str
    count: int = 1


class Cpu(Reply):
    id: str
    vcpuCount: int  # noqa: N815


class GpuUse(Reply):
    util: int | None = None
    """Percent."""


class Port(Reply):
    private: int | None = None
    public: int | None = None
    ip: str | None = None


class Runtime(Reply):
    """State of a running container."""

    uptime: int | None = None
    """Seconds since the container was last started."""
    gpus: list[GpuUse] = Field(default_factory=list)
    ports: list[Port] = Field(default_factory=list)


class Pod(Reply):
    id: str
    name: str
    status: Status | str
    """A plain string if the state is newer than this client."""
    cost: float = 0.0
    """USD per hour; 0 when it has ended."""
    gpu: Gpu | None = None
    cpu: Cpu | None = None
    mounts: Mounts = Mounts()
    dataCenterId: str | None = None  # noqa: N815
    runtime: Runtime | None = None
    createdAt: datetime  # noqa: N815
    startedAt: datetime | None = None  # noqa: N815


class CreateVolume(Request):
    name: Annotated[str, Field(min_length=1)]
    size: Annotated[int, Field(ge=10, le=4096)]
    dataCenter: Annotated[str, Field(min_length=1)]  # noqa: N815


class Volume(Reply):
    id: str
    name: str
    size: int
    """GB."""
    dataCenter: str  # noqa: N815
    type: str = "STANDARD"

    @property
    def usd_per_hour(self) -> float:
        """$0.07 per GB and month up to 1 TB, $0.05 above (docs.runpod.io, Aug 2026; standard storage)."""
        return (0.07 * min(self.size, 1000) + 0.05 * max(0, self.size - 1000)) / HOURS_PER_MONTH


class Stock(Reply):
    """Availability of a machine type in a data centre: a hint, not a reservation."""

    id: str
    availability: str = "NONE"


class Price(Reply):
    secure: float = 0.0
    """USD per hour and GPU."""


class MaxCount(Reply):
    secure: int = 0


class GpuType(Reply):
    id: str
    name: str
    memory: int
    """GB."""
    price: Price
    maxCount: MaxCount = MaxCount()  # noqa: N815
    availability: str | None = None
    dataCenters: list[Stock] = Field(default_factory=list)  # noqa: N815


class Vcpus(Reply):
    min: int
    max: int


class CpuPrice(Reply):
    securePerVcpu: float  # noqa: N815
    """USD per hour and vCPU."""


class CpuType(Reply):
    id: str
    name: str
    vcpu: Vcpus
    ramGbPerVcpu: float = 0.0  # noqa: N815
    price: CpuPrice
    availability: str | None = None
    dataCenters: list[Stock] = Field(default_factory=list)  # noqa: N815


class DataCenter(Reply):
    id: str
    name: str
    region: str = "UNKNOWN"
    networkVolumeTypes: list[str] = Field(default_factory=list)  # noqa: N815
    gpuAvailability: list[Stock] = Field(default_factory=list)  # noqa: N815


class Billed(Reply):
    """What a pod or a volume cost in one period."""

    startTime: datetime  # noqa: N815
    endTime: datetime  # noqa: N815
    podId: str | None = None  # noqa: N815
    networkVolumeId: str | None = None  # noqa: N815
    totalAmount: float  # noqa: N815


class LogLine(Reply):
    """A line of a pod's log."""

    source: str
    line: str
    ts: str
    id: str = ""
    """The event's id, from which the stream can be resumed."""
