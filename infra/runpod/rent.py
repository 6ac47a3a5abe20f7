"""From a list of wishes to one pod: what is refused before anything is rented, which machines are tried in which order, and that nothing is
rented above its price or beyond the budget."""

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
"""Between the catalogue's price and a pod's own."""
STOCK = {"HIGH": 0, "MEDIUM": 1, "LOW": 2, "NONE": 3}
"""A hint: what is said to be gone is tried last, not never."""
ROUND_S = 30.0
"""Between two rounds through all candidates while capacity is waited for."""


class NothingFreeError(InfraError):
    """No machine that would do is free now."""


class UnwantedError(InfraError):
    """While a machine was waited for, its flow run ended or was cancelled; nothing was rented."""


class PriceError(InfraError):
    """A pod costs more than the catalogue said; it was ended at once."""


@dataclass(frozen=True)
class Wish:
    """The machine that is wanted."""

    image: str
    gpus: Sequence[str] = ()
    """GPUs in order of preference; none for a CPU pod."""
    gpu_count: int = 1
    cpus: Sequence[str] = ()
    """CPU flavours in order of preference, for a pod without a GPU."""
    vcpus: int = 2
    disk_gb: int = 20
    max_usd_per_hour: float = 10.0
    min_cuda: str | None = None
    data_centers: Sequence[str] = ()
    """Without a volume: where it may be. With one: the volume's."""
    registry: str | None = None
    ports: Sequence[str] = ()
    """Open to the outside, e.g. `4200/http`."""
    args: str = ""
    env: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Candidate:
    """One machine to ask for."""

    kind: GpuRequest | CpuRequest
    data_center: str
    usd_per_hour: float
    stock: str

    def __str__(self) -> str:
        count = f"{self.kind.count} x " if isinstance(self.kind, GpuRequest) else f"{self.kind.vcpuCount} vCPUs of "
        return f"{count}{self.kind.id} in {self.data_center}"


def candidates(client: RunPod, wish: Wish, volume: Volume | None) -> list[Candidate]:
    """The machines to ask for, best first. Raises RefusedError where the wish cannot be fulfilled at any time."""
    if bool(wish.gpus) == bool(wish.cpus):
        raise RefusedError("give GPUs or CPU flavours, and not both", where="gpus, cpus", fix="name one kind of machine")
    offered: list[GpuType] | list[CpuType] = client.gpus(count=wish.gpu_count) if wish.gpus else client.cpus(vcpus=wish.vcpus)
    offers: dict[str, GpuType | CpuType] = {one.id: one for one in offered}
    wanted = list(wish.gpus or wish.cpus)
    if unknown := [name for name in wanted if name not in offers]:
        near = [match for name in unknown for match in _nearest(name, list(offers))] or sorted(offers)
        raise RefusedError(
            f"RunPod has no {', '.join(map(repr, unknown))}",
            where="gpus" if wish.gpus else "cpus",
            fix=f"did you mean {', '.join(map(repr, near))}?",
        )
    if volume and wish.data_centers and volume.dataCenter not in wish.data_centers:
        raise RefusedError(
            f"the volume {volume.name} is in {volume.dataCenter}, and pods are wanted in {', '.join(wish.data_centers)}",
            where="data_centers",
            fix="a volume can be mounted in its own data centre only: name that one, or another volume",
        )
    found, costly = [], []
    for name in wanted:
        offer = offers[name]
        kind: GpuRequest | CpuRequest
        if isinstance(offer, GpuType):
            kind = GpuRequest(id=name, count=wish.gpu_count, minCudaVersion=wish.min_cuda)
            usd = offer.price.secure * wish.gpu_count
        else:
            kind = CpuRequest(id=name, vcpuCount=wish.vcpus)
            usd = offer.price.securePerVcpu * wish.vcpus
        if usd > wish.max_usd_per_hour:
            costly.append(f"{name} costs ${usd:.2f}/h")
            continue
        stocks = {one.id: one.availability for one in offer.dataCenters}
        places = [volume.dataCenter] if volume else list(wish.data_centers) or list(stocks)
        here = [Candidate(kind, place, usd, stocks.get(place, "NONE")) for place in places]
        found += sorted(here, key=lambda one: STOCK.get(one.stock, 3))
    if not found:
        raise RefusedError(
            f"every machine is above the ceiling of ${wish.max_usd_per_hour:.2f} per hour: {'; '.join(costly)}",
            where="max_usd_per_hour",
            fix="raise it, or name cheaper machines",
        )
    return sorted(found, key=lambda one: one.stock == "NONE")


def rent(
    client: RunPod,
    wish: Wish,
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
    """A pod for a flow run, the first of the candidates that can be had; waits up to `wait_s` for one to become free.

    `environment` gives the variables that depend on the deadline and on what is rented. `warn` hears when a share of the cap is passed.
    `go_on` is asked after every wait whether the pod is still wanted.

    Raises RefusedError, BudgetError, NothingFreeError (with all that was tried), UnwantedError, PriceError, or a RunPodError that no other
    candidate mends. Where it is not known whether there is a pod (UnavailableError), its reservation stands until the reaper has looked.
    """
    began = time.monotonic()
    machines = candidates(client, wish, volume)
    while True:
        tried: list[str] = []
        final: InfraError | None = None
        for machine in machines:
            deadline = budget.clock() + max_runtime_s
            name = PodName.new(volume.id, deadline, run)
            request = _request(wish, machine, str(name), volume, mount_path, environment(deadline, machine))
            position = budget.reserve(str(name), usd_per_hour=machine.usd_per_hour, until=deadline, phase=phase)
            try:
                pod = client.create_pod(request)
            except UnavailableError:
                raise
            except InfraError as error:
                budget.release(str(name))
                if not _others_may_do(error):
                    raise
                # the words of a refusal are not promised: one that is not known to mean capacity is final where all are so
                final = None if isinstance(error, NoCapacityError) or (tried and final is None) else error
                tried.append(f"{machine} ({error.what.removeprefix('RunPod: ')})")
                continue
            if not pod.cost:  # an answer that does not say it yet: the ledger must not promise nothing
                pod = pod.model_copy(update={"cost": machine.usd_per_hour})
            try:
                budget.started(str(name), pod.id, usd_per_hour=pod.cost)
            except (InfraError, OSError):  # a pod that the ledger does not know would be billed beside it
                client.terminate(pod.id)
                raise
            if pod.cost > min(machine.usd_per_hour * PRICE_TOLERANCE, wish.max_usd_per_hour * PRICE_TOLERANCE):
                client.terminate(pod.id)
                budget.ended(str(name))
                raise PriceError(
                    f"a pod of {machine} costs ${pod.cost:.2f}/h and not ${machine.usd_per_hour:.2f}/h as in the catalogue",
                    where=f"pod {pod.id}, which was ended",
                    fix="try again; if it stays so, raise max_usd_per_hour knowingly",
                )
            promised = position.committed - max_runtime_s / HOUR_S * machine.usd_per_hour
            for line in warnings_between(promised, position.committed, budget.cap_usd):
                warn(line)
            say(f"rented {machine} as pod {pod.id} for ${pod.cost:.2f}/h, until {utc_text(deadline)} at the latest")
            return pod, name
        if final is not None:
            raise final
        left = wait_s - (time.monotonic() - began)
        if left <= 0:
            raise NothingFreeError(
                f"nothing is free: {'; '.join(tried)}",
                where="RunPod",
                fix="name more GPUs, wait longer (capacity_wait_s), or put the volume where there are more",
            )
        say(f"nothing is free, tried again for {left:.0f} s more: {'; '.join(map(str, machines))}")
        sleep(min(ROUND_S, left))
        if not go_on():
            raise UnwantedError(
                "the flow run has ended or was cancelled; nothing was rented", where=f"flow run {run}", fix="start it again"
            )


def _others_may_do(error: InfraError) -> bool:
    """Whether another candidate may be had: after any status 400, which says no capacity as well as a broken rule, and after 403."""
    refused = isinstance(error, InvalidRequestError) and error.status == HTTPStatus.BAD_REQUEST
    return refused or isinstance(error, NoCapacityError | NoAccessError)


def _request(wish: Wish, machine: Candidate, name: str, volume: Volume, path: str, more: dict[str, str]) -> CreatePod:
    try:
        return CreatePod(
            name=name,
            image=wish.image,
            args=wish.args,
            env=wish.env | more,
            disk=wish.disk_gb,
            gpu=machine.kind if isinstance(machine.kind, GpuRequest) else None,
            cpu=machine.kind if isinstance(machine.kind, CpuRequest) else None,
            mounts=Mounts(network=[NetworkMount(volumeId=volume.id, path=path)]),
            dataCenterIds=[machine.data_center],
            registry=wish.registry,
            ports=list(wish.ports) or None,
        )
    except ValueError as error:
        raise InvalidRequestError(f"this is no pod: {error}", where="the job variables", fix="correct them") from None


def _nearest(name: str, known: list[str]) -> Iterator[str]:
    """The names that are most like a wrong one: by spelling, or by a word that both have."""
    lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
    shared = [one for one in lower if set(name.lower().replace("-", " ").split()) & set(one.replace("-", " ").split()) - {"nvidia"}]
    yield from dict.fromkeys(lower[one] for one in (*close, *shared))


def utc_text(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))
