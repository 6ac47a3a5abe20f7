"""What can be made to go wrong, as it has for users of RunPod. A fault is armed and strikes the requests or the pods that come next.

Where the public reports of such cases are (dstack's and SkyPilot's issues), and the fault or the part of the emulator that is each of them:

    dstack 1133    given up on, and still there             never_starts
    dstack 1142    a bad command is started for ever        bad_command
    dstack 1551    marked terminated, and billed on         billed_on
    dstack 1740    an offer without capacity                no_capacity (the catalogue goes on to say HIGH)
    dstack 1886    shown $0.98, charged $1.52               wrong_price
    dstack 1976    stuck on "layer does not exist"          image_missing
    dstack 3217    a region in lower case is refused        every create of a volume or pod
    dstack 3853    a volume is deleted that is gone         404, as for every second DELETE
    SkyPilot 7318  deleted while it is being provisioned    deleted_early
    SkyPilot 4286  deleted by hand                          deleted
    SkyPilot 7117  a loss that nobody notices               dies
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
    """One fault. API faults strike `times` requests, `away` every request for `seconds`; pod faults strike the next `times` pods."""

    kind: str
    times: int = 1
    after_s: float = 0.0
    """Of a pod: how long after its container started."""
    seconds: float = 0.0
    """How long the API is away; or what a 429 asks to wait."""
    where: str = ""
    """Only this GPU or data centre, or pods with this in their name; empty is all."""
    began: float = field(default_factory=time.monotonic)


class Faults:
    """The faults that are armed. Used by several threads."""

    def __init__(self) -> None:
        self._armed: list[Fault] = []
        self._lock = threading.Lock()

    def arm(self, fault: Fault) -> None:
        """From now on."""
        if fault.kind not in (*API_FAULTS, *POD_FAULTS):
            raise ValueError(f"there is no fault {fault.kind!r}; there are: {', '.join((*API_FAULTS, *POD_FAULTS))}")
        with self._lock:
            self._armed.append(fault)

    def clear(self) -> None:
        """No fault any more."""
        with self._lock:
            self._armed.clear()

    def strikes(self, kind: ApiFault, *subjects: str) -> Fault | None:
        """The fault, if one of this kind strikes a request about these subjects; counted down."""
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
        """The faults that strike the pod that is being created."""
        with self._lock:
            struck = [fault for fault in self._armed if fault.kind in POD_FAULTS and fault.where in name]
            for fault in struck:
                self._use(fault)
            return struck

    def _use(self, fault: Fault) -> None:
        fault.times -= 1
        if fault.times <= 0:
            self._armed.remove(fault)
