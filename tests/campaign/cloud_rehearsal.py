"""The complete pipeline at home and on emulated pods: the same results, and a bill that agrees with the ledger and with the plan.

Both runs go through the real command, a real Prefect server and real workers; the second through pools of pods and the volume's S3 API.
Then precompute's own schedule starts it once more on that volume: on a CPU pod, which has to end.
The plan is made of the times that the first run measured, before the second begins. On a machine that others use meanwhile the two runs
take different times for the same work, and the plan is off by that much.

    python -m tests.campaign.cloud_rehearsal --folder DIR [--profile ci]

What is finished in DIR is not run again: after an interruption the same command goes on.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import IntervalSchedule
from rich.console import Console

from deployments import register
from deployments.cloud import Rehearsal, rehearsal
from deployments.profile import chosen_profile
from deployments.speedrun import speedrun
from flows.registry import PHASES
from fvlm_core.manifest import FILE_NAME, AnyManifest
from infra.prefect_settings import apply, without
from infra.runpod.bills import reconcile
from infra.runpod.client import RunPod
from infra.runpod.emulator.cloud import disk_cost
from infra.stack import REPOSITORY, Stack
from infra.store import FolderStore
from tasks.bill import bill_against_plan, billed_by_step, finished_phases
from tasks.dollars import DollarPlan, in_dollars
from tasks.plan import plan
from tasks.rented import budget_of, by_phase

EVERY = timedelta(minutes=1)
SCHEDULED_WITHIN_S, ENDED_WITHIN_S = 480.0, 60.0
TIMED = ("speed",)
"""Phases that measure time: their results differ from run to run."""


def main() -> int:
    """Run both, compare, and print; 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--profile", default="ci")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="PATH=VALUE")
    options = parser.parse_args()
    folder = options.folder.resolve()
    console, home, away = Console(), folder / "local", folder / "cloud"
    command = [sys.executable, "-m", "deployments.cli", "speedrun", "--profile", options.profile, "--volume", str(home)]
    command += [word for change in options.changes for word in ("--set", change)]
    # a process of its own: Prefect's settings in this one will be those of the second server
    if subprocess.run(command, cwd=REPOSITORY, check=False).returncode:
        return 1
    problems: list[str] = []

    def check(cloud: Rehearsal) -> None:
        problems.extend(bills(cloud, planned, console))

    planned = planned_from(options.profile, options.changes, home, folder / "empty")
    more = {"keep_server": False, "port": None, "changes": options.changes}
    if speedrun(options.profile, None, away, console=console, emulated=True, inspect=check, **more):
        return 1
    problems += results(home, away, console)
    problems += by_schedule(options.profile, options.changes, away, console)
    for problem in problems:
        console.print(f"[red]{problem}[/red]")
    return 1 if problems else 0


def planned_from(profile: str, changes: list[str], measured: Path, empty: Path) -> DollarPlan:
    """The plan of a run on an empty volume, from the times on another."""
    empty.mkdir(parents=True, exist_ok=True)
    phases = list(PHASES.values())
    with rehearsal(chosen_profile(profile, changes=changes), empty) as cloud:
        made = plan(phases, cloud.config, empty, measured=measured)
        return in_dollars(made, phases, cloud.rental)


def bills(cloud: Rehearsal, planned: DollarPlan, console: Console) -> list[str]:
    """The ledger against the emulator's own books, before and after RunPod's bill is taken over; the plan against both."""
    store = FolderStore(Path(cloud.rental.mount_path))
    ledger = budget_of(cloud.rental, store)
    with RunPod(cloud.emulator.key, cloud.emulator.url) as client:
        problems = [f"the ledger alone is off: {line}" for line in reconcile(client, ledger)]
    books = cloud.emulator.cloud
    true = sum(usd + disk_cost(pod, hours) for pod, hours, usd in books.pod_bills()) + sum(usd for _, usd in books.volume_bills())
    position, now = ledger.position(), ledger.clock()
    billed = position.spent + position.storage
    console.print(f"ledger ${billed:.4f}, the emulator's bill ${true:.4f}")
    problems += [f"the ledger says ${billed:.4f}, the emulator ${true:.4f}"] if abs(billed - true) >= 0.01 else []
    bill = billed_by_step(store, by_phase(position.entries), now)
    console.print(bill_against_plan(planned, bill).terminal())
    off = bill.total / planned.total.value - 1
    return problems + ([f"the bill is {off:+.0%} off the plan"] if abs(off) > 0.10 else [])


def results(home: Path, away: Path, console: Console) -> list[str]:
    """Steps whose results differ between the two volumes, by their manifests' digests: every file that is part of a result, losses too."""
    here, there = (finished_phases(FolderStore(volume)) for volume in (home, away))
    problems, same = [f"{phase} ran on one of them only" for phase in here.keys() ^ there.keys()], 0
    for phase in here.keys() & there.keys():
        mine, other = here[phase].steps, there[phase].steps
        for name in sorted(mine.keys() | other.keys()):
            equal = name in mine and name in other and mine[name].digest == other[name].digest
            same += equal
            if not equal and phase not in TIMED:
                problems.append(f"{phase}/{name} differs: {_difference(home / mine[name].folder, away / other[name].folder)}")
    console.print(f"{same} steps have the same results on both")
    return problems


def by_schedule(profile: str, changes: list[str], away: Path, console: Console) -> list[str]:
    """Switch the schedule of precompute's deployment on; what is wrong with the run that it makes, or with the end of that run's pod."""
    with rehearsal(chosen_profile(profile, changes=changes), away) as cloud, RunPod(cloud.emulator.key, cloud.emulator.url) as client:
        stack = Stack(away, environment=without(os.environ) | cloud.environment)
        try:
            stack.start_server()
            apply(stack.client_environment())
            stack.wait_for_server()
            registered = asyncio.run(register.register(cloud.config, away))
            stack.start_workers(registered.pool_types)
            run = _scheduled_run(registered.deployment)
            if run is None:
                return [f"the schedule of precompute made no run that ended within {SCHEDULED_WITHIN_S} s"]
            pods = [pod.request.cpu and pod.request.cpu.id for pod in cloud.emulator.cloud.pods.values() if run.id.hex in pod.request.name]
            console.print(f"by its schedule: {run.name} {run.state_name}, pods {pods}")
            deadline = time.monotonic() + ENDED_WITHIN_S
            while client.pods() and time.monotonic() < deadline:
                time.sleep(1)
            wrong = [] if run.state_name == "Completed" else [f"the scheduled run of precompute ended {run.state_name}"]
            wrong += [] if len(pods) == 1 and pods[0] else [f"the scheduled run had {len(pods)} pods, {pods}, and not one with CPUs"]
            return wrong + [f"pod {pod.name} did not end with its scheduled run" for pod in client.pods()]
        finally:
            stack.stop()


def _scheduled_run(deployment: str) -> FlowRun | None:
    """The first run that precompute's schedule made and that has ended."""
    with get_client(sync_client=True) as client:
        made = client.read_deployment_by_name(f"precompute/{deployment}")
        client.update_deployment_schedule(made.id, made.schedules[0].id, active=True, schedule=IntervalSchedule(interval=EVERY))
        its_own = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[made.id]))
        deadline = time.monotonic() + SCHEDULED_WITHIN_S
        while time.monotonic() < deadline:
            ended = [run for run in client.read_flow_runs(flow_run_filter=its_own) if run.state and run.state.is_final()]
            if found := [run for run in ended if run.auto_scheduled]:
                client.update_deployment_schedule(made.id, made.schedules[0].id, active=False)
                return found[0]
            time.sleep(1)
    return None


def _difference(one: Path, other: Path) -> str:
    """The files of two results that are not the same."""
    if not (one / FILE_NAME).is_file() or not (other / FILE_NAME).is_file():
        return "one is not there"
    files = [{entry.path: entry.sha256 for entry in AnyManifest.read(folder).files if entry.identity} for folder in (one, other)]
    return ", ".join(sorted(name for name, _ in files[0].items() ^ files[1].items())[:5]) or "the settings"


if __name__ == "__main__":
    sys.exit(main())
