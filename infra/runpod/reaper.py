"""Ends orphaned pods. It needs RunPod's key and nothing else: no flow, no worker, no Prefect server, no volume.

A pod's name contains its owner, its flow run and its deadline (`naming`). If the Prefect server answers, pods whose run is over or unknown
are ended too; if the ledger can be reached, it is updated.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from infra.budget import Budget
from infra.errors import InfraError
from infra.runpod.client import RunPod
from infra.runpod.errors import RunPodError
from infra.runpod.models import OVER, Pod
from infra.runpod.naming import NO_RUN, PodName

OVERTIME_S = 120.0
"""Time after its deadline in which a pod may end itself."""
YOUNG_S = 300.0
"""A younger pod may belong to a run that is still being submitted, and a younger ledger entry to a pod that is still being created."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reaped:
    """A pod that the reaper has ended, or failed to end."""

    pod: Pod
    reason: str
    problem: str = ""


def reap(
    client: RunPod,
    owner: str,
    *,
    over: Callable[[UUID], str | None] = lambda run: None,
    budget: Budget | None = None,
    now: float | None = None,
    young_s: float = YOUNG_S,
    everything: bool = False,
) -> list[Reaped]:
    """End the orphaned pods of `owner`, or all of them with `everything`. Pods of others are not touched.

    Returns the pods that it has ended or tried to end. `over` returns why a flow run no longer needs its pod, or None if it does or if
    that is unknown. It is not called for pods younger than `young_s`, nor for one without a flow run. A ledger that cannot be reached is
    only logged.
    """
    now = time.time() if now is None else now
    reaped, left = [], set()
    for pod in client.pods():
        name = PodName.parse(pod.name)
        if name is None or name.owner != owner:
            continue
        reason = "everything is ended" if everything else _reason(pod, name, over, now, young_s)
        if reason is None:
            left.add(pod.name)
            continue
        try:
            client.terminate(pod.id)
            reaped.append(Reaped(pod, reason))
        except RunPodError as error:
            left.add(pod.name)
            reaped.append(Reaped(pod, reason, error.what))
    if budget is not None:
        try:
            settle(budget, left, now, young_s)
        except (InfraError, OSError) as error:
            log.warning("the ledger was not brought up to date: %s", error)
    return reaped


def settle(budget: Budget, alive: set[str], now: float, young_s: float = YOUNG_S) -> None:
    """Record in the ledger the end of pods that no longer run; `alive` are the names of those that do."""
    for entry in budget.entries():
        if entry.kind == "pod" and entry.running and entry.name not in alive and now - entry.since >= young_s:
            budget.ended(entry.name, at=min(now, entry.until)) if entry.started else budget.release(entry.name)


def _reason(pod: Pod, name: PodName, over: Callable[[UUID], str | None], now: float, young_s: float) -> str | None:
    """Return why the pod has to end, or None if it may continue."""
    if now > name.deadline + OVERTIME_S:
        return f"it is {(now - name.deadline) / 60:.0f} min past its deadline"
    if pod.status in OVER:
        return f"it is {pod.status} and still there"
    if name.run == NO_RUN or now - pod.createdAt.timestamp() < young_s:
        return None
    return over(name.run)
