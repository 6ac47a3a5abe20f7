"""The emulator's account: pods and their life cycle, network volumes, and their cost."""

import hashlib
import secrets
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra.runpod.emulator.catalogue import CPUS, DATA_CENTERS, GPUS, disk_usd_per_hour, volume_usd_per_hour
from infra.runpod.emulator.containers import Container
from infra.runpod.emulator.faults import Fault, Faults
from infra.runpod.emulator.network import Network
from infra.runpod.models import CreatePod, CreateVolume, Status
from infra.runpod.pod import EMULATED_VARIABLE

ACTIONS = {
    Status.RUNNING: ["stop", "restart", "terminate"],
    Status.EXITED: ["start", "terminate"],
    Status.ERROR: ["start", "terminate"],
    Status.PROVISIONING: ["stop", "terminate"],
    Status.STARTING: ["stop", "terminate"],
    Status.TERMINATED: [],
}
FORWARDED = ("PREFECT_API_URL", "FVLM_RUNPOD_URL")
"""Variables of a pod whose URLs go through its own emulated network."""
ANSWER_S = 0.3
BAD_COMMAND = "sh -c 'sleep 0.5; exit 127'"
"""Behaves like the pod's program in an image without python3."""
NO_INSTANCES = "There are no longer any instances available with the requested specifications. Please refresh and try again."


class RuleError(Exception):
    """A well-formed request cannot be carried out. Has the status and the text of the response."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


@dataclass(frozen=True)
class Delays:
    """Durations of the changes of a pod's state, in seconds."""

    provision_s: float = 0.3
    start_s: float = 0.2
    restart_s: float = 0.3


@dataclass
class Volume:
    id: str
    name: str
    size: int
    data_center: str
    folder: Path
    created: datetime
    deleted: datetime | None = None

    def reply(self) -> dict[str, Any]:
        return {"id": self.id, "name": self.name, "size": self.size, "dataCenter": self.data_center, "type": "STANDARD"}


@dataclass
class Pod:
    """A pod, its container and its bill."""

    id: str
    request: CreatePod
    data_center: str
    usd_per_hour: float
    container: Container
    network: Network
    key: str
    """RUNPOD_API_KEY inside the pod, which can only end this pod."""
    faults: list[Fault]
    status: Status = Status.PROVISIONING
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    started: datetime | None = None
    ended: datetime | None = None
    """When billing ended."""
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def listed(self) -> bool:
        return self.status != Status.TERMINATED

    def struck_by(self, kind: str) -> Fault | None:
        return next((fault for fault in self.faults if fault.kind == kind), None)

    def reply(self) -> dict[str, Any]:
        request, running = self.request, self.status == Status.RUNNING
        kind: dict[str, Any]
        if request.gpu:
            kind = {"gpu": {"id": request.gpu.id, "count": request.gpu.count}}
        else:
            assert request.cpu is not None
            ram = next(offer.ram_gb_per_vcpu for offer in CPUS if offer.id == request.cpu.id)
            kind = {"cpu": {**request.cpu.model_dump(), "memory": int(request.cpu.vcpuCount * ram)}}
        util = 0 if self.struck_by("gpu_idle") else 90
        gpus = [{"util": util, "memoryUtil": util}] * request.gpu.count if request.gpu else []
        return {
            "id": self.id,
            "name": request.name,
            "status": self.status.value,
            "actions": ACTIONS[self.status],
            "image": request.image,
            "args": request.args,
            "disk": request.disk,
            "env": request.env,
            "ports": request.ports or [],
            "mounts": request.mounts.model_dump() if request.mounts else {},
            "registry": request.registry,
            "cloud": "SECURE",
            "dataCenterId": self.data_center,
            "cudaVersion": "12.8" if request.gpu else None,
            "ssh": {"proxy": None, "direct": None},
            "template": None,
            "cost": self.usd_per_hour if self.status not in (Status.EXITED, Status.TERMINATED) else 0.0,
            "locked": False,
            "globalNetworking": {"enabled": False},
            "runtime": {"uptime": self.container.uptime_s, "gpus": gpus, "ports": []} if running else None,
            "createdAt": _text(self.created),
            "startedAt": _text(self.started) if self.started else None,
            **kind,
        }


class Cloud:
    """One account. Thread-safe."""

    def __init__(self, folder: Path, *, delays: Delays | None = None) -> None:
        self.folder, self.delays = folder.resolve(), delays or Delays()
        self.pods: dict[str, Pod] = {}
        self.volumes: dict[str, Volume] = {}
        self.faults = Faults()
        self._lock = threading.RLock()

    def create_pod(self, request: CreatePod) -> Pod:
        """Create a pod. Raises RuleError if that is not possible."""
        volume = self._volume_of(request)
        wanted = request.dataCenterIds or ([volume.data_center] if volume else list(DATA_CENTERS))
        if volume and volume.data_center not in wanted:
            raise RuleError(400, f"network volume {volume.id} is in {volume.data_center}, not in {', '.join(wanted)}")
        places = [place for place in wanted if place in DATA_CENTERS and (volume is None or volume.data_center == place)]
        rate, offered = self._offer(request)
        subject = request.gpu.id if request.gpu else request.cpu.id if request.cpu else ""
        free = [place for place in places if place in offered and not self.faults.strikes("no_capacity", subject, place)]
        if not free:
            raise RuleError(400, NO_INSTANCES)
        if self.faults.strikes("rule_broken", subject):
            raise RuleError(400, "this machine does not support the requested configuration")
        if self.faults.strikes("no_balance"):
            raise RuleError(402, "insufficient balance")
        if self.faults.strikes("wrong_price", subject):
            rate *= 1.55  # shown $0.98, charged $1.52
        pod = self._place(request, volume, free[0], rate)
        with self._lock:
            self.pods[pod.id] = pod
        threading.Thread(target=self._live, args=(pod,), name=pod.id, daemon=True).start()
        return pod

    def pod(self, pod: str) -> Pod:
        """Return a pod by id. Raises RuleError if it does not exist, or no longer exists."""
        with self._lock:
            found = self.pods.get(pod)
        if found is None or not found.listed:
            raise RuleError(404, f"pod {pod} not found")
        return found

    def terminate(self, pod: Pod) -> None:
        """Terminate a pod, which ends its billing."""
        pod.status = Status.TERMINATED
        self._end(pod)
        threading.Thread(target=pod.container.stop, daemon=True).start()

    def act(self, pod: Pod, action: str) -> None:
        """Change a pod's state. Raises RuleError if its current state does not allow the action."""
        if action not in ACTIONS[pod.status]:
            raise RuleError(409, f"action {action} is not valid for a pod that is {pod.status.value}")
        if action == "terminate":
            self.terminate(pod)
        elif action == "stop":
            pod.status = Status.EXITED
            self._end(pod)
            pod.container.stop()
        elif action == "restart":
            pod.container.restart()
        else:
            raise RuleError(409, "this emulator starts no stopped pod: terminate it and create another one")

    def create_volume(self, request: CreateVolume) -> Volume:
        """Create a volume in a new folder of the emulator."""
        if request.dataCenter not in DATA_CENTERS:
            raise RuleError(400, f"there is no data center {request.dataCenter}")
        return self.adopt_volume(request.name, request.size, request.dataCenter, self.folder / "volumes" / secrets.token_hex(4))

    def adopt_volume(self, name: str, size_gb: int, data_center: str, folder: Path) -> Volume:
        """Create a volume in a given folder. The same folder always gets the same id."""
        folder.mkdir(parents=True, exist_ok=True)
        known = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:10]
        volume = Volume(known, name, size_gb, data_center, folder.resolve(), datetime.now(UTC))
        with self._lock:
            self.volumes[known] = volume
        return volume

    def volume(self, volume: str) -> Volume:
        """Return a volume by id. Raises RuleError if it does not exist, or no longer exists."""
        found = self.volumes.get(volume)
        if found is None or found.deleted:
            raise RuleError(404, f"network volume {volume} not found")
        return found

    def delete_volume(self, volume: Volume) -> None:
        """Delete a volume with everything on it."""
        volume.deleted = datetime.now(UTC)
        shutil.rmtree(volume.folder, ignore_errors=True)

    def pod_bills(self) -> Iterator[tuple[Pod, float, float]]:
        """Yield each pod that ever existed, its hours, and their cost in USD without its disk."""
        for pod in list(self.pods.values()):
            hours = ((pod.ended or datetime.now(UTC)) - pod.created).total_seconds() / 3600
            yield pod, hours, hours * pod.usd_per_hour

    def volume_bills(self) -> Iterator[tuple[Volume, float]]:
        """Yield each volume that ever existed, and its cost in USD."""
        for volume in list(self.volumes.values()):
            hours = ((volume.deleted or datetime.now(UTC)) - volume.created).total_seconds() / 3600
            yield volume, hours * volume_usd_per_hour(volume.size)

    def close(self) -> None:
        """End all containers."""
        for pod in list(self.pods.values()):
            pod.over.set()
            pod.container.stop(grace_s=1.0)
            pod.network.close()

    def _volume_of(self, request: CreatePod) -> Volume | None:
        if request.mounts is None or not request.mounts.network:
            return None
        mount = request.mounts.network[0]
        volume = self.volume(mount.volumeId)
        if Path(mount.path) != volume.folder:
            raise RuleError(400, f"this emulator mounts volume {volume.id} at {volume.folder} only")
        return volume

    def _offer(self, request: CreatePod) -> tuple[float, tuple[str, ...]]:
        """Return the price of the requested machine in USD per hour, and the data centres that have it."""
        if request.gpu:
            gpu = next((offer for offer in GPUS if offer.id == request.gpu.id), None)
            if gpu is None:
                raise RuleError(400, f"unknown gpu id {request.gpu.id}")
            if request.gpu.count > gpu.max_count:
                raise RuleError(400, f"at most {gpu.max_count} of {gpu.id} on a pod")
            return gpu.usd_per_hour * request.gpu.count, gpu.data_centers
        assert request.cpu is not None
        cpu = next((offer for offer in CPUS if offer.id == request.cpu.id), None)
        if cpu is None or request.cpu.vcpuCount > cpu.max_vcpus:
            raise RuleError(400, f"no cpu flavor {request.cpu.id} with {request.cpu.vcpuCount} vCPUs")
        return cpu.usd_per_vcpu_hour * request.cpu.vcpuCount, cpu.data_centers

    def _place(self, request: CreatePod, volume: Volume | None, data_center: str, rate: float) -> Pod:
        name, key = secrets.token_hex(7), secrets.token_urlsafe(16)
        root, network = self.folder / "pods" / name, Network()
        injected = {
            "RUNPOD_POD_ID": name,
            "RUNPOD_DC_ID": data_center,
            "RUNPOD_POD_HOSTNAME": f"{name}-emulated",
            "RUNPOD_GPU_COUNT": str(request.gpu.count if request.gpu else 0),
            "RUNPOD_CPU_COUNT": str(request.cpu.vcpuCount if request.cpu else 8),
            "RUNPOD_API_KEY": key,
            EMULATED_VARIABLE: "1",
            **({"RUNPOD_VOLUME_ID": volume.id} if volume else {}),
        }
        environment = network.through({**request.env, **injected}, FORWARDED)
        gpu = (request.gpu.id, request.gpu.count) if request.gpu else None
        container = Container(root, request.args, environment, gpu=gpu, disk_gb=request.disk)
        if volume:
            inside = root / "workspace"
            if not inside.exists():
                inside.symlink_to(volume.folder)
        return Pod(name, request, data_center, rate, container, network, key, self.faults.for_pod(request.name))

    def _live(self, pod: Pod) -> None:
        """Run the life cycle of a pod after its creation."""
        if pod.over.wait(self.delays.provision_s) or pod.struck_by("never_starts"):
            return
        if pod.struck_by("deleted_early"):
            self.terminate(pod)
            return
        if pod.struck_by("bad_command"):
            pod.container.command = BAD_COMMAND
        self._become(pod, Status.STARTING)
        if pod.struck_by("image_missing"):
            pod.container.log.add("system", f"error pulling image {pod.request.image}: layer does not exist")
            return
        if pod.over.wait(self.delays.start_s) or not self._become(pod, Status.RUNNING):
            return
        pod.started = datetime.now(UTC)
        pod.container.disk_full = pod.struck_by("disk_full") is not None
        for fault in pod.faults:
            threading.Thread(target=self.strike, args=(pod, fault), daemon=True).start()
        pod.container.run(self.delays.restart_s)

    def strike(self, pod: Pod, fault: Fault) -> None:
        """Let a fault strike a running pod, after its delay."""
        if pod.over.wait(fault.after_s):
            return
        if fault.kind == "dies":
            pod.container.kill()
            if self._become(pod, Status.ERROR):
                pod.container.log.add("system", "the machine failed")
        elif fault.kind == "hangs":
            pod.container.pause()
        elif fault.kind == "no_network":
            pod.network.cut()
        elif fault.kind == "deleted":
            self.terminate(pod)
        elif fault.kind == "restarts":
            pod.container.restart()

    def _become(self, pod: Pod, status: Status) -> bool:
        """Change the state of a pod. Returns False if the pod is already over."""
        with self._lock:
            if pod.over.is_set() or pod.status in (Status.EXITED, Status.TERMINATED):
                return False
            pod.status = status
            return True

    def _end(self, pod: Pod) -> None:
        pod.over.set()
        with self._lock:
            if pod.ended is None and not pod.struck_by("billed_on"):
                pod.ended = datetime.now(UTC)
        # delayed, so that a pod that ends itself still gets the response
        threading.Timer(ANSWER_S, pod.network.close).start()


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def disk_cost(pod: Pod, hours: float) -> float:
    """Return the cost in USD of a pod's container disk."""
    return hours * disk_usd_per_hour(pod.request.disk)
