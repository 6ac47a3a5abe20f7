"""Rents one pod from a list of preferences: refuses impossible requests first, tries machines in order of preference, and never exceeds the
price limit or the budget."""

import difflib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from uuid import UUID

from infra.budget import HOUR_S, Budget, warnings_between
from infra.errors import InfraError, RefusedError
from infra.runpod.client import RunPod
from infra.runpod.errors import InvalidRequestError, NoAccessError, NoCapacityError, UnavailableError
from infra.runpod.models import CpuRequest, CpuType, CreatePod, GpuRequest, GpuType, Mounts, NetworkMount, Pod, Volume
from infra.runpod.naming import PodName

PRICE_TOLERANCE = 1.02
"""Maximum ratio of a pod's actual price to the catalogue's price or the price limit."""
STOCK = {"HIGH": 0, "MEDIUM": 1, "LOW": 2, "NONE": 3}
"""Rank of each stock level. It is only a hint: machines that are said to be out of stock are tried last, but they are tried."""
ROUND_S = 30.0
"""Interval between two rounds through all candidates while waiting for capacity."""


class NoMachineAvailableError(InfraError):
    """None of the acceptable machines is free now."""


class RunEndedError(InfraError):
    """The flow run ended or was cancelled while it waited for a machine. Nothing was rented."""


class PriceError(InfraError):
    """A pod costs more than the catalogue said; it was ended at once."""


@dataclass(frozen=True)
class PodRequirements:
    """The requested machine."""

    image: str
    gpus: Sequence[str] = ()
    """GPUs in order of preference; empty for a CPU pod."""
    gpu_count: int = 1
    cpus: Sequence[str] = ()
    """CPU flavours in order of preference, for a pod without a GPU."""
    vcpus: int = 2
    disk_gb: int = 20
    max_usd_per_hour: float = 10.0
    min_cuda: str | None = None
    data_centers: Sequence[str] = ()
    """Where the machine may be; empty: anywhere. With a volume it is in the volume's data centre, which must be one of these."""
    registry: str | None = None
    ports: Sequence[str] = ()
    """Open to the outside, e.g. `4200/http`."""
    args: str = ""
    env: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Candidate:
    """One machine to try to rent."""

    kind: GpuRequest | CpuRequest
    data_center: str
    usd_per_hour: float
    stock: str

    def __str__(self) -> str:
        count = f"{self.kind.count} x " if isinstance(self.kind, GpuRequest) else f"{self.kind.vcpuCount} vCPUs of "
        return f"{count}{self.kind.id} in {self.data_center}"


def candidates(client: RunPod, requirements: PodRequirements, volume: Volume | None) -> list[Candidate]:
    """Return the machines to try, best first. Raises RefusedError if the request can never be met."""
    if bool(requirements.gpus) == bool(requirements.cpus):
        raise RefusedError("give GPUs or CPU flavours, and not both", where="gpus, cpus", fix="name one kind of machine")
    offered: list[GpuType] | list[CpuType] = (
        client.gpus(count=requirements.gpu_count) if requirements.gpus else client.cpus(vcpus=requirements.vcpus)
    )
    offers: dict[str, GpuType | CpuType] = {one.id: one for one in offered}
    wanted = list(requirements.gpus or requirements.cpus)
    if unknown := [name for name in wanted if name not in offers]:
        near = [match for name in unknown for match in _nearest(name, list(offers))] or sorted(offers)
        raise RefusedError(
            f"RunPod has no {', '.join(map(repr, unknown))}",
            where="gpus" if requirements.gpus else "cpus",
            fix=f"did you mean {', '.join(map(repr, near))}?",
        )
    if volume and requirements.data_centers and volume.dataCenter not in requirements.data_centers:
        raise RefusedError(
            f"the volume {volume.name} is in {volume.dataCenter}, and pods are wanted in {', '.join(requirements.data_centers)}",
            where="data_centers",
            fix="a volume can be mounted in its own data centre only: name that one, or another volume",
        )
    found, costly = [], []
    for name in wanted:
        offer = offers[name]
        kind: GpuRequest | CpuRequest
        if isinstance(offer, GpuType):
            kind = GpuRequest(id=name, count=requirements.gpu_count, minCudaVersion=requirements.min_cuda)
            usd = offer.price.secure * requirements.gpu_count
        else:
            kind = CpuRequest(id=name, vcpuCount=requirements.vcpus)
            usd = offer.price.securePerVcpu * requirements.vcpus
        if usd > requirements.max_usd_per_hour:
            costly.append(f"{name} costs ${usd:.2f}/h")
            continue
        stocks = {one.id: one.availability for one in offer.dataCenters}
        places = [volume.dataCenter] if volume else list(requirements.data_centers) or list(stocks)
        here = [Candidate(kind, place, usd, stocks.get(place, "NONE")) for place in places]
        found += sorted(here, key=lambda one: STOCK.get(one.stock, 3))
    if not found:
        raise RefusedError(
            f"every machine is above the ceiling of ${requirements.max_usd_per_hour:.2f} per hour: {'; '.join(costly)}",
            where="max_usd_per_hour",
            fix="raise it, or name cheaper machines",
        )
    return sorted(found, key=lambda one: one.stock == "NONE")


def rent(
    client: RunPod,
    requirements: PodRequirements,
    budget: Budget,
    *,
    run: UUID,
    volume: Volume,
    mount_path: str,
    max_runtime_s: float,
    phase: str = "",
    wait_s: float = 0.0,
    say: Callable[[str], None] = lambda line: None,
    warn: Callable[[str], None] = lambda line: None,
    environment: Callable[[float, Candidate], dict[str, str]] = lambda deadline, candidate: {},
    go_on: Callable[[], bool] = lambda: True,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Pod, PodName]:
    """Rent a pod for a flow run: the first candidate that is available. Waits up to `wait_s` seconds for one to become free.

    `environment` returns the variables that depend on the deadline and on the rented machine. `warn` is called when a share of the cap is
    passed. `go_on` is called after every wait and returns whether the pod is still wanted.

    Raises RefusedError, BudgetError, NoMachineAvailableError (which lists what was tried), RunEndedError, PriceError, or a RunPodError that
    would occur with any other candidate too. If it is unknown whether there is a pod (UnavailableError), its reservation stays until the
    reaper has checked.
    """
    began = time.monotonic()
    machines = candidates(client, requirements, volume)
    while True:
        tried: list[str] = []
        final: InfraError | None = None
        for machine in machines:
            deadline = budget.clock() + max_runtime_s
            name = PodName.new(volume.id, deadline, run)
            request = _request(requirements, machine, str(name), volume, mount_path, environment(deadline, machine))
            position = budget.reserve(str(name), usd_per_hour=machine.usd_per_hour, until=deadline, phase=phase)
            try:
                pod = client.create_pod(request)
            except UnavailableError:
                raise
            except InfraError as error:
                budget.release(str(name))
                if not _others_may_do(error):
                    raise
                # the wording of refusals may change: one that is not known to mean no capacity is final only if all are of this kind
                final = None if isinstance(error, NoCapacityError) or (tried and final is None) else error
                tried.append(f"{machine} ({error.what.removeprefix('RunPod: ')})")
                continue
            if not pod.cost:  # the response may lack the price, but the ledger needs one
                pod = pod.model_copy(update={"cost": machine.usd_per_hour})
            try:
                budget.started(str(name), pod.id, usd_per_hour=pod.cost)
            except (InfraError, OSError):  # a pod that is not in the ledger would be missing in the budget
                client.terminate(pod.id)
                raise
            if pod.cost > min(machine.usd_per_hour * PRICE_TOLERANCE, requirements.max_usd_per_hour * PRICE_TOLERANCE):
                client.terminate(pod.id)
                budget.ended(str(name))
                raise PriceError(
                    f"a pod of {machine} costs ${pod.cost:.2f}/h and not ${machine.usd_per_hour:.2f}/h as in the catalogue",
                    where=f"pod {pod.id}, which was ended",
                    fix="try again; if it stays so, raise max_usd_per_hour knowingly",
                )
            before = position.committed - max_runtime_s / HOUR_S * machine.usd_per_hour
            for line in warnings_between(before, position.committed, budget.cap_usd):
                warn(line)
            say(f"rented {machine} as pod {pod.id} for ${pod.cost:.2f}/h, until {utc_text(deadline)} at the latest")
            return pod, name
        if final is not None:
            raise final
        left = wait_s - (time.monotonic() - began)
        if left <= 0:
            raise NoMachineAvailableError(
                f"nothing is free: {'; '.join(tried)}",
                where="RunPod",
                fix="name more GPUs, wait longer (capacity_wait_s), or put the volume where there are more",
            )
        say(f"nothing is free, retrying for another {left:.0f} s: {'; '.join(map(str, machines))}")
        sleep(min(ROUND_S, left))
        if not go_on():
            raise RunEndedError(
                "the flow run has ended or was cancelled; nothing was rented", where=f"flow run {run}", fix="start it again"
            )


def _others_may_do(error: InfraError) -> bool:
    """Return whether to try another candidate: after any status 400, which means no capacity or a broken rule, and after 403."""
    refused = isinstance(error, InvalidRequestError) and error.status == HTTPStatus.BAD_REQUEST
    return refused or isinstance(error, NoCapacityError | NoAccessError)


def _request(requirements: PodRequirements, machine: Candidate, name: str, volume: Volume, path: str, more: dict[str, str]) -> CreatePod:
    try:
        return CreatePod(
            name=name,
            image=requirements.image,
            args=requirements.args,
            env=requirements.env | more,
            disk=requirements.disk_gb,
            gpu=machine.kind if isinstance(machine.kind, GpuRequest) else None,
            cpu=machine.kind if isinstance(machine.kind, CpuRequest) else None,
            mounts=Mounts(network=[NetworkMount(volumeId=volume.id, path=path)]),
            dataCenterIds=[machine.data_center],
            registry=requirements.registry,
            ports=list(requirements.ports) or None,
        )
    except ValueError as error:
        raise InvalidRequestError(f"this pod cannot be requested: {error}", where="the job variables", fix="correct them") from None


def _nearest(name: str, known: list[str]) -> Iterator[str]:
    """Yield the known names that are closest to an unknown one: by spelling, or because they share a word."""
    lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
    shared = [one for one in lower if set(name.lower().replace("-", " ").split()) & set(one.replace("-", " ").split()) - {"nvidia"}]
    yield from dict.fromkeys(lower[one] for one in (*close, *shared))


def utc_text(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))
