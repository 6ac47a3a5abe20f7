"""Faults that can be injected, as users of RunPod have met them. A fault is armed, and then strikes the next requests or pods.

Public reports of such cases (issues of dstack and SkyPilot), with the fault or the part of the emulator that reproduces each of them:

    dstack 1133    a pod that was given up still exists     never_starts
    dstack 1142    a bad command is restarted forever       bad_command
    dstack 1551    marked as terminated, but still billed   billed_on
    dstack 1740    an offer without capacity                no_capacity (the catalogue still says HIGH)
    dstack 1886    shown $0.98, charged $1.52               wrong_price
    dstack 1976    stuck on "layer does not exist"          image_missing
    dstack 3217    a region in lower case is refused        every create of a volume or pod
    dstack 3853    deletion of a volume that is gone        404, as for every second DELETE
    SkyPilot 7318  deleted while being provisioned          deleted_early
    SkyPilot 4286  deleted by hand                          deleted
    SkyPilot 7117  a loss that goes unnoticed               dies
"""

import threading
import time
from dataclasses import dataclass, field
from typing import Literal, get_args

ApiFault = Literal[
    "no_capacity",
    "too_many_requests",
    "server_error",
    "create_lost",
    "away",
    "pod_key_refused",
    "wrong_price",
    "no_balance",
    "rule_broken",
    "listed_late",
]
PodFault = Literal[
    "dies",
    "hangs",
    "disk_full",
    "never_starts",
    "image_missing",
    "no_network",
    "deleted",
    "deleted_early",
    "bad_command",
    "billed_on",
    "gpu_idle",
    "restarts",
]
API_FAULTS: tuple[str, ...] = get_args(ApiFault)
POD_FAULTS: tuple[str, ...] = get_args(PodFault)


@dataclass
class Fault:
    """One fault. An API fault strikes `times` requests (`away`: every request for `seconds`), a pod fault the next `times` pods."""

    kind: str
    times: int = 1
    after_s: float = 0.0
    """Delay of a pod fault after the start of the container."""
    seconds: float = 0.0
    """How long the API is away, or the Retry-After of a 429."""
    where: str = ""
    """Limits the fault to this GPU or data centre, or to pods with this in their name; empty: no limit."""
    began: float = field(default_factory=time.monotonic)


class Faults:
    """The armed faults. Thread-safe."""

    def __init__(self) -> None:
        self._armed: list[Fault] = []
        self._lock = threading.Lock()

    def arm(self, fault: Fault) -> None:
        """Arm a fault. Raises ValueError if there is none of this kind."""
        if fault.kind not in (*API_FAULTS, *POD_FAULTS):
            raise ValueError(f"there is no fault {fault.kind!r}; there are: {', '.join((*API_FAULTS, *POD_FAULTS))}")
        with self._lock:
            self._armed.append(fault)

    def clear(self) -> None:
        """Disarm all faults."""
        with self._lock:
            self._armed.clear()

    def strikes(self, kind: ApiFault, *subjects: str) -> Fault | None:
        """Return the fault of this kind that strikes a request about these subjects, or None, and count it down."""
        with self._lock:
            for fault in self._armed:
                if fault.kind != kind or (fault.where and fault.where not in subjects):
                    continue
                if kind == "away":
                    if time.monotonic() - fault.began < fault.seconds:
                        return fault
                    continue
                self._use(fault)
                return fault
        return None

    def for_pod(self, name: str) -> list[Fault]:
        """Return the faults that strike the pod that is being created, and count them down."""
        with self._lock:
            struck = [fault for fault in self._armed if fault.kind in POD_FAULTS and fault.where in name]
            for fault in struck:
                self._use(fault)
            return struck

    def _use(self, fault: Fault) -> None:
        fault.times -= 1
        if fault.times <= 0:
            self._armed.remove(fault)
