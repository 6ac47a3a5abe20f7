"""Flow runs on emulated pods, through a real Prefect server and a real worker."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import psutil
import pytest
from playwright.sync_api import expect
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import InfrastructureNotAvailable, InfrastructureNotFound
from prefect.schedules import Interval
from prefect.states import Cancelling
from prefect.types.entrypoint import EntrypointType

from deployments.watch import RUN_VARIABLE
from infra.processes import marked
from infra.runpod.client import RunPod
from infra.runpod.emulator.faults import Fault
from infra.runpod.emulator.server import Emulator
from infra.runpod.models import CpuRequest, CreatePod, Pod, Volume
from infra.runpod.naming import PodName
from infra.runpod.pool import POLL_S, RunPodConfiguration
from infra.runpod.reaper import reap
from infra.runpod.worker import CANCEL_S, RUN_LOOK_S, RunPodWorker
from infra.stack import Stack
from tests.browser import SLOW_MS, browser_page
from tests.conftest import known_to_clients
from tests.infra.runpod import quick_worker
from tests.infra.runpod.conftest import KEY, QUICK
from tests.infra.runpod.rig import PLANTED, Rig, working
from tests.infra.runpod.tiny_flow import tiny
from tests.waiting import wait_until

pytestmark = pytest.mark.slow(reason="every flow run starts a process with Prefect")

LOST = {
    "dies": (Fault("dies", after_s=0.5), "the pod is ERROR"),
    "deleted": (Fault("deleted", after_s=0.5), "the pod is gone"),
    "full": (Fault("disk_full"), "the pod could not be set up: [Errno 27]"),
    "deleted early": (Fault("deleted_early"), "the pod is gone"),
    "stuck": (Fault("never_starts"), "the pod did not start in 3 s; it is PROVISIONING"),
    "image": (Fault("image_missing"), "error pulling image runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404: layer does not exist"),
    "loop": (Fault("bad_command"), "; system: the container's command ended with status 127; it is started again"),
    "hung": (Fault("hangs", after_s=0.3), "no sign of life"),
}
"""Faults of a pod by the name of the run that they strike, and what its state says then."""
INSTALLS = "(for i in $(seq 90); do echo [pod] setting up: $i; sleep 1; done) & sleep 15; exec python -m prefect.engine"
"""A command like a pod that installs packages for longer than its run may be silent."""
REFUSED = {
    "no such flavour": ({"cpus": ["cpu9"]}, "'cpu3c'?"),
    "budget": ({"budget_usd": 15.01}, "this pod to its deadline $0.06"),
    "no such volume": ({"volume": "elsewhere"}, "there is no volume called 'elsewhere'"),
    "elsewhere": ({"data_centers": ["EU-RO-1"]}, "is in US-KS-2, and pods are wanted in EU-RO-1"),
    "ceiling": ({"max_usd_per_hour": 0.01}, "above the ceiling of $0.01"),
    "wrong key": ({"api_key": "rpa_wrong"}, "invalid bearer token"),
    "too many variables": ({"env": {f"V{number}": "1" for number in range(60)}}, "environment variables; a pod takes"),
}
"""Job variables that are refused before anything is rented, and what the run's state says then."""


@pytest.fixture(scope="module")
def rig(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder, quick = tmp_path_factory.mktemp("cloud"), {"start_timeout_s": 3.0, "silent_s": 45.0}
    with (
        Emulator(folder, key=KEY, delays=QUICK) as cloud,
        known_to_clients(stack),
        working(Rig(stack, cloud, quick, quick_worker.__name__)) as rig,
    ):
        yield rig


@pytest.fixture(scope="module")
def runs(rig: Rig) -> dict[str, FlowRun]:
    """All of them at once, as a worker has them."""
    fine = {"good": rig.submit("good"), "bad": rig.submit("bad", fail=True)}
    fine["installs"] = rig.submit("installs", variables={"silent_s": 10.0, "command": f"sh -c '{INSTALLS}'"})
    quick = {key: {"silent_s": 6.0} for key in ("hung", "loop")}  # before the first heartbeat
    lost = {name: rig.submit(name, fault=fault, variables=quick.get(name), pieces=1000) for name, (fault, _) in LOST.items()}
    return fine | lost | {name: rig.submit(name, variables=wrong) for name, (wrong, _) in REFUSED.items()}


def pods_of(rig: Rig, run: FlowRun) -> list[Pod]:
    return [pod for pod in rig.client.pods() if (name := PodName.parse(pod.name)) and name.run == run.id]


def secrets_in(rig: Rig, *texts: str) -> list[str]:
    """Where a planted secret is: logs, the ledger, what pods wrote (results too), artifacts, command lines of processes."""
    places = {str(path): path.read_text(errors="replace") for path in rig.folder.rglob("*") if path.is_file()}
    places |= {"worker": rig.log.read_text(), "given": "\n".join(texts)}
    with get_client(sync_client=True) as client:
        places["artifacts"] = "".join(one.model_dump_json() for one in client.read_artifacts())
        places["states"] = "".join(one.model_dump_json() for one in client.read_flow_runs())
    for process in psutil.process_iter(["cmdline"]):
        places[f"process {process.pid}"] = " ".join(process.info["cmdline"] or [])
    return [place for place, text in places.items() if any(secret in text for secret in (KEY, PLANTED))]


def test_prefects_clean_up_ends_a_pod_and_says_where_it_cannot(client: RunPod, emulator: Emulator, volume: Volume) -> None:
    cpu = CpuRequest(id="cpu3c", vcpuCount=2)
    pod = client.create_pod(CreatePod(name="fvlm-left", image="i", args="sleep 600", cpu=cpu))
    given = {
        "volume": volume.id,
        "runpod_url": emulator.url,
        "api_key": KEY,
        "volume_folder": str(emulator.cloud.volumes[volume.id].folder),
    }
    configuration = RunPodConfiguration.model_validate(given)

    def kill() -> None:
        asyncio.run(RunPodWorker(work_pool_name="any").kill_infrastructure(pod.id, configuration))

    emulator.cloud.faults.arm(Fault("too_many_requests", times=5))
    with pytest.raises(InfrastructureNotAvailable):
        kill()
    assert [one.id for one in client.pods()] == [pod.id]
    kill()
    assert client.pods() == []
    with pytest.raises(InfrastructureNotFound):
        kill()


def test_the_pool_type_is_known_to_prefects_own_commands(rig: Rig) -> None:
    name = f"{rig.pool}-by-hand"
    made = [sys.executable, "-m", "prefect", "work-pool", "create", name, "--type", "runpod"]
    subprocess.run(made, env=rig.environment, check=True, capture_output=True)
    with get_client(sync_client=True) as client:
        pool = client.read_work_pool(name)
    assert pool.type == "runpod"
    assert {"gpus", "max_usd_per_hour", "max_runtime_h", "api_key"} <= pool.base_job_template["variables"]["properties"].keys()


def test_flow_runs_are_pods_that_end_with_them(rig: Rig, runs: dict[str, FlowRun]) -> None:
    good, bad = runs["good"], runs["bad"]
    assert rig.finish(good.id).is_completed(), rig.tail()
    assert rig.finish(bad.id).is_failed()
    wait_until(lambda: not pods_of(rig, good) + pods_of(rig, bad), "their pods to end")
    wait_until(lambda: "[pod] runs" in "\n".join(rig.run_logs(good.id)), "the pod's log to reach the run's")
    lines = rig.run_logs(good.id)
    assert any(line.startswith("tiny flow on pod") for line in lines), "what the job prints is in the run's log"
    assert sum("Finished in state Completed" in line for line in lines) == 1, "what the run logs itself is not there twice"
    assert secrets_in(rig, *lines, *rig.run_logs(bad.id)) == []


@pytest.mark.parametrize("name", LOST)
def test_a_lost_pod_crashes_its_run_with_a_reason_and_is_ended(rig: Rig, runs: dict[str, FlowRun], name: str) -> None:
    assert rig.finish(runs[name].id).is_crashed()
    wait_until(lambda: not pods_of(rig, runs[name]), "its pod to end")
    wait_until(lambda: not list(marked(RUN_VARIABLE, str(runs[name].id))), "its process to end, which may say something as well")
    wait_until(lambda: LOST[name][1] in (rig.state(runs[name].id).message or ""), "the reason")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_a_crash_before_anything_is_rented(rig: Rig, runs: dict[str, FlowRun], name: str) -> None:
    state = rig.finish(runs[name].id)
    assert state.is_crashed()
    assert REFUSED[name][1] in (state.message or "")
    assert not [pod for pod in rig.emulator.cloud.pods.values() if runs[name].id.hex in pod.request.name]


def test_no_secret_shows_and_a_click_in_the_ui_ends_the_pod_within_a_minute(rig: Rig) -> None:
    run = rig.submit("clicked", pieces=1000, show=True)
    wait_until((rig.folder / "work" / "clicked" / "piece1").exists, "the run to work")
    its_own = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
    with get_client(sync_client=True) as client:
        assert [one.key for one in client.read_artifacts(artifact_filter=its_own)] == ["tiny"]
    assert secrets_in(rig, *rig.run_logs(run.id)) == [], "while a pod runs"
    with browser_page() as page:
        page.goto(rig.stack.opening_link() or "")
        expect(page.get_by_role("link", name="Deployments")).to_be_visible(timeout=SLOW_MS)  # the UI has read the password
        page.goto(f"{rig.stack.ui_url}/runs/flow-run/{run.id}")
        page.get_by_role("button", name="Cancel").first.click()
        page.get_by_role("button", name="Confirm").click()
        wait_until(lambda: rig.state(run.id).type in (StateType.CANCELLING, StateType.CANCELLED), "the click to arrive", poll_s=0.5)
    wait_until(lambda: not pods_of(rig, run), "its pod to end", timeout_s=60)
    assert CANCEL_S + RUN_LOOK_S + POLL_S < 45, "the worker of this test has shorter waits"
    assert rig.finish(run.id).is_cancelled()


def test_a_run_that_is_cancelled_while_a_machine_is_waited_for_rents_none(rig: Rig) -> None:
    rig.emulator.cloud.faults.arm(Fault("no_capacity", where="cpu5c"))
    run = rig.submit("waits", variables={"cpus": ["cpu5c"], "capacity_wait_s": 6.0})
    wait_until(lambda: any("nothing is free, retrying" in line for line in rig.run_logs(run.id)), "it to wait", poll_s=0.3)
    rig.prefect.set_flow_run_state(run.id, Cancelling())
    wait_until(lambda: any("Failed to submit" in line for line in rig.run_logs(run.id)), "its worker to give it up", poll_s=0.3)
    assert rig.finish(run.id).is_cancelled()
    assert not [pod for pod in rig.emulator.cloud.pods.values() if run.id.hex in pod.request.name]


def test_a_schedule_starts_a_pod_and_ends_it(rig: Rig) -> None:
    """As the precompute's does, on the pool for CPU pods."""
    made = tiny.to_deployment(
        "scheduled",
        work_pool_name=rig.pool,
        parameters={"folder": str(rig.folder / "work" / "scheduled")},
        entrypoint_type=EntrypointType.MODULE_PATH,
        schedule=Interval(timedelta(seconds=20), anchor_date=datetime.now(UTC) + timedelta(seconds=8)),  # from now it would be in 20 s
    ).apply()
    by_schedule = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[made]))
    with get_client(sync_client=True) as client:

        def completed() -> list[FlowRun]:
            return [run for run in client.read_flow_runs(flow_run_filter=by_schedule) if run.state and run.state.is_completed()]

        wait_until(completed, "a run of the schedule", poll_s=0.5)
        first = completed()[0]
        client.delete_deployment(made)
    assert first.auto_scheduled
    wait_until(lambda: not pods_of(rig, first), "its pod to end")
    assert [pod.request.cpu is not None for pod in rig.emulator.cloud.pods.values() if first.id.hex in pod.request.name] == [True]


def test_a_pod_that_installs_packages_for_long_is_not_taken_for_dead(rig: Rig, runs: dict[str, FlowRun]) -> None:
    state = rig.finish(runs["installs"].id)
    assert state.is_completed(), state.message


def test_the_ledger_knows_that_all_of_them_have_ended(rig: Rig, runs: dict[str, FlowRun]) -> None:
    for run in runs.values():
        rig.finish(run.id)
    rig.wait_for_no_pods()
    wait_until(lambda: not any(entry.running and entry.kind == "pod" for entry in rig.budget.entries()), "the ledger to know")
    assert {entry.phase for entry in rig.budget.entries() if entry.started} == {"tiny"}


def test_a_killed_worker_is_followed_by_another_or_by_the_reaper_alone(rig: Rig) -> None:
    adopted, left, vanished = (rig.submit(name, pieces=1000) for name in ("adopted", "left", "vanished"))
    unstarted = rig.submit("unstarted", fault=Fault("never_starts"), variables={"start_timeout_s": 600.0})
    wait_until(lambda: {rig.state(run.id).type for run in (adopted, left, vanished)} == {StateType.RUNNING}, "the runs to run", poll_s=0.5)
    wait_until(lambda: rig.prefect.read_flow_run(unstarted.id).infrastructure_pid, "the pending run to have its pod", poll_s=0.5)
    rig.kill_worker(signal.SIGKILL)
    (pod,), (reaped,) = pods_of(rig, adopted), pods_of(rig, left)
    rig.emulator.cloud.pods[reaped.id].container.pause()
    gone_pods = {run.id: pods_of(rig, run)[0] for run in (vanished, unstarted)}
    for gone_pod in gone_pods.values():
        rig.emulator.cloud.pods[gone_pod.id].container.kill()  # ended by a signal, its run would report that itself
        rig.client.terminate(gone_pod.id)
    name = PodName.parse(reaped.name)
    assert name is not None
    assert reap(rig.client, name.owner, now=name.deadline) == []
    gone = reap(rig.client, name.owner, over=lambda run: "unknown" if run == left.id else None, now=name.deadline + 60.0)
    assert [one.pod.id for one in gone] == [reaped.id]
    rig.emulator.cloud.faults.arm(Fault("too_many_requests", times=5))  # as often as the client asks
    rig.start_worker()
    wait_until(lambda: f"goes on with the pod {pod.id}" in rig.tail(), "the new worker to take it over, at its second try")
    assert "looking for pods of an earlier worker failed, retrying" in rig.tail()
    rig.emulator.cloud.strike(rig.emulator.cloud.pods[pod.id], Fault("dies"))
    state = rig.finish(adopted.id)
    assert state.is_crashed()
    assert "the pod is ERROR" in (state.message or "")
    for run, gone_pod in gone_pods.items():
        state = rig.finish(run)
        assert state.is_crashed()
        assert f"pod {gone_pod.id}: it is gone" in (state.message or "")
    rig.wait_for_no_pods()
