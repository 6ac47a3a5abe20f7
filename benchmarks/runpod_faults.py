"""Fault injection for rented machines: flow runs on an emulated RunPod, each with a fault at a random moment.

Prefect server, worker and processes are real; only the machines are emulated. Every run stands for a phase: if its pod is lost, it is
started again, as the pipeline does. A last round kills flow, worker and server at once and leaves the pods to the reaper. Reported are the
number of runs, the runs that completed or ended with a clear error, the pods left behind, the dollars beyond what the ledger had reserved,
and the pieces of work that were done twice.

    python -m benchmarks.runpod_faults [--runs 54] [--at-once 4] [--seed 0] [--only KIND]
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import State
from prefect.context import refresh_global_settings_context

from benchmarks.report import Measurement, show
from infra.budget import HOUR_S
from infra.prefect_settings import without
from infra.runpod.emulator.cloud import Delays
from infra.runpod.emulator.faults import API_FAULTS, POD_FAULTS, Fault
from infra.runpod.emulator.server import Emulator
from infra.runpod.naming import PodName, owner
from infra.runpod.reaper import OVERTIME_S, reap
from infra.stack import Stack
from tests.infra.runpod.rig import Rig, working

NAME = "runpod_faults"
WITHOUT, WORKER, SMALL_BUDGET = "none", "worker_killed", "small_budget"
KINDS = (WITHOUT, *POD_FAULTS, *API_FAULTS, WORKER, SMALL_BUDGET)
PIECES, PIECE_S = 8, 0.25
LATEST_S = 6.0
"""Latest time of a fault, in seconds after the pod has started. The work takes two seconds, and Prefect's start before it about three."""
AWAY_S = 8.0
ATTEMPTS = 4
RUN_TIMEOUT_S = 900.0
VARIABLES = {
    "start_timeout_s": 8.0,
    "silent_s": 45.0,  # heartbeats come every 30 s at most
    "idle_gpu_s": 4.0,
    "capacity_wait_s": 20.0,
    "max_runtime_h": 0.5,
    "gpus": ["NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB"],
    "cpus": [],
}


@dataclass(frozen=True)
class Ended:
    """The outcome of a run."""

    kind: str
    completed: bool
    message: str
    attempts: int

    @property
    def clear(self) -> bool:
        """Whether it completed, or failed with an error that names the cause."""
        return self.completed or any(word in self.message for word in ("fix:", "pod "))


def main() -> int:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--runs", type=int, default=54)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS)
    options = parser.parse_args()
    kinds = [options.only] if options.only else list(KINDS)
    environment = without(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        stack = Stack(Path(folder) / "server", environment=environment)
        delays = Delays(provision_s=0.2, start_s=0.2, restart_s=0.3)
        try:
            stack.start_server()
            stack.wait_for_server()
            os.environ.update(stack.client_environment())  # for all threads; `temporary_settings` affects only one
            refresh_global_settings_context()
            with Emulator(Path(folder) / "cloud", key="rpa_benchmark", delays=delays) as cloud:
                show(measured(Rig(stack, cloud, VARIABLES), kinds, options), as_json=options.json)
        finally:
            stack.stop()
    return 0


def measured(rig: Rig, kinds: list[str], options: argparse.Namespace) -> list[Measurement]:
    """Run all runs, then the round that only the reaper survives."""
    rng = random.Random(options.seed)
    plan = [(kinds[number % len(kinds)], rng.uniform(0.0, LATEST_S)) for number in range(options.runs)]
    ended: list[Ended] = []
    with working(rig):
        gate = threading.Lock()
        with ThreadPoolExecutor(options.at_once) as pool:
            for number, one in enumerate(pool.map(lambda job: run(rig, gate, *job), enumerate(plan))):
                ended.append(one)
                how = "completed" if one.completed else one.message.splitlines()[0][:90]
                print(f"{number + 1}/{options.runs} {one.kind}: {how} ({one.attempts} attempts)", file=sys.stderr, flush=True)
        rig.emulator.cloud.faults.clear()
        rig.wait_for_no_pods(RUN_TIMEOUT_S)
        left = all_killed(rig)
    beyond, repeated = usd_beyond_plan(rig), work_repeated(rig)
    for one in ended:
        if not one.clear:
            print(f"unclear: {one}", file=sys.stderr)
    figures: list[tuple[str, float, str]] = [
        ("runs", len(ended), "runs"),
        ("completed_or_clear_error", sum(one.clear for one in ended), "runs"),
        ("completed", sum(one.completed for one in ended), "runs"),
        ("pods_left", left, "pods"),
        ("usd_beyond_plan", beyond, "USD"),
        ("work_repeated", repeated, "pieces"),
    ]
    return [Measurement(NAME, metric, value, unit) for metric, value, unit in figures]


def run(rig: Rig, gate: threading.Lock, number: int, struck: tuple[str, float]) -> Ended:
    """Run one phase with its fault, and start it again if its pod was lost."""
    kind, moment = struck
    name, state = f"run{number}-{kind}", None
    variables: dict[str, Any] = {"budget_usd": 15.5} if kind == SMALL_BUDGET else {}
    for attempt in range(1, ATTEMPTS + 1):
        fault = Fault(kind, after_s=moment) if kind in POD_FAULTS and attempt == 1 else None
        if kind in API_FAULTS and attempt == 1:
            rig.emulator.cloud.faults.arm(Fault(kind, times=2 if kind != "no_capacity" else 3, seconds=AWAY_S if kind == "away" else 1.0))
        submitted = rig.submit(name, fault=fault, variables=variables, pieces=PIECES, seconds=PIECE_S)
        if kind == WORKER and attempt == 1:
            time.sleep(moment)
            with gate:
                rig.kill_worker(signal.SIGKILL)
                rig.start_worker()
        state = finished(rig, submitted.id)
        if not state.is_crashed() or ("fix:" in (state.message or "") and kind not in API_FAULTS):
            break
    assert state is not None
    return Ended(kind, state.is_completed(), state.message or "", attempt)


def finished(rig: Rig, run: UUID) -> State[Any]:
    """Wait for the run's final state. Errors are ignored, because the server may be too busy to answer."""
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            state = rig.state(run)
            if state.is_final():
                return state
        time.sleep(0.5)
    raise TimeoutError(f"the run {run} has not ended\n{rig.tail()}")


def all_killed(rig: Rig) -> int:
    """Kill flow, worker and server at once, then run the reaper. Returns the number of pods left."""
    runs = [rig.submit(f"last{number}", pieces=1000) for number in range(2)]
    wait(lambda: len(rig.client.pods()) == len(runs) and all(pod.runtime for pod in rig.client.pods()), "the last pods")
    time.sleep(3.0)
    rig.kill_worker(signal.SIGKILL)
    server = rig.stack.children["server"]
    server.kill()
    first, second = rig.client.pods()
    rig.emulator.cloud.pods[first.id].container.pause()  # the container hangs forever
    rig.emulator.cloud.pods[second.id].container.kill()  # the process is gone, but the pod is still billed
    latest = max(name.deadline for pod in (first, second) if (name := PodName.parse(pod.name)))
    reap(rig.client, owner(rig.volume.id), budget=rig.budget, now=latest + OVERTIME_S + 1.0)
    wait(lambda: not rig.client.pods(), "the reaper", must=False)
    return len(rig.client.pods())


def wait(condition: Callable[[], object], what: str, *, must: bool = True, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            if must:
                raise TimeoutError(what)
            return
        time.sleep(0.2)


def usd_beyond_plan(rig: Rig) -> float:
    """Return the cost of pods beyond what the ledger had reserved to their deadlines. Pods that the ledger does not know count in full."""
    promised: defaultdict[str, float] = defaultdict(float)
    for event in rig.budget.events():
        if event.what == "reserved":
            promised[event.name] = (event.until - event.at) * event.usd_per_hour / HOUR_S
    return sum(max(0.0, usd - promised[pod.request.name]) for pod, _, usd in rig.emulator.cloud.pod_bills())


def work_repeated(rig: Rig) -> int:
    """Count the pieces of work that were done more than once."""
    return sum(piece.stat().st_size > 1 for piece in (rig.folder / "work").glob("*/piece*"))


if __name__ == "__main__":
    sys.exit(main())
