"""The program of a pod, on emulated pods: without Prefect and without a worker."""

import base64
import hashlib
import io
import json
import os
import socket
import sys
import tarfile
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from fvlm_core.errors import is_user_error
from infra.runpod.client import RunPod
from infra.runpod.emulator.faults import Fault
from infra.runpod.emulator.server import Emulator
from infra.runpod.models import CpuRequest, CreatePod, GpuRequest, Mounts, NetworkMount, Volume
from infra.runpod.models import Pod as RentedPod
from infra.runpod.pod import (
    CODE,
    END_S,
    ENVIRONMENTS,
    IDENTITY,
    JOB_VARIABLE,
    OUTCOME,
    PODS,
    PROGRAM_SAYS,
    SETTING_UP,
    SHARDS,
    STARTED,
    Pod,
    PreflightError,
)
from infra.runpod.program import PROGRAM_VARIABLE, START
from infra.stack import REPOSITORY, Stack
from tests.waiting import wait_until

A100 = "NVIDIA A100 80GB PCIe"


class Pods:
    """Pods with jobs, on the volume of an emulator."""

    def __init__(self, client: RunPod, emulator: Emulator, volume: Volume) -> None:
        self.client, self.emulator, self.volume = client, emulator, volume
        self.folder = emulator.cloud.volumes[volume.id].folder
        (self.folder / IDENTITY).write_text(json.dumps({"id": volume.id}))

    def start(
        self,
        command: list[str],
        *,
        gpu: GpuRequest | None = None,
        gpu_asked: dict[str, Any] | None = None,
        seconds: float = 600.0,
        **more: Any,
    ) -> RentedPod:
        program = (REPOSITORY / "infra" / "runpod" / "pod.py").read_bytes()
        job = {
            "run": "a-run",
            "deadline": time.time() + seconds,
            "volume": self.volume.id,
            "mount_path": str(self.folder),
            "command": command,
            "python": sys.executable,
            "gpu": gpu_asked or ({"id": gpu.id, "count": gpu.count} if gpu else None),
            "free_volume_gb": 0.0,
            "free_disk_gb": 0.0,
            "retry_s": 0.1,
            "grace_s": 1.0,
        }
        environment = {
            PROGRAM_VARIABLE: base64.b64encode(zlib.compress(program)).decode(),
            "FVLM_POD_JOB": json.dumps(job | more),
            "FVLM_RUNPOD_URL": self.emulator.url,
        }
        mounts = Mounts(network=[NetworkMount(volumeId=self.volume.id, path=str(self.folder))])
        machine: dict[str, Any] = {"gpu": gpu} if gpu else {"cpu": CpuRequest(id="cpu3c", vcpuCount=2)}
        return self.client.create_pod(CreatePod(name="fvlm-test", image="i", args=START, env=environment, mounts=mounts, **machine))

    def await_end(self, pod: RentedPod, timeout_s: float = 90.0) -> None:
        """Until the pod has ended itself and the emulator has read the last of what it printed."""
        wait_until(lambda: pod.id not in [one.id for one in self.client.pods()], f"pod {pod.id} to end itself", timeout_s)
        wait_until(lambda: self.emulator.cloud.pods[pod.id].container.log.closed, f"the end of the log of pod {pod.id}", timeout_s)

    def outcome(self, pod: RentedPod) -> dict[str, Any]:
        """How its job ended, when the pod has ended itself."""
        self.await_end(pod)
        return json.loads((self.folder / PODS / pod.id / OUTCOME).read_text())

    def log(self, pod: RentedPod) -> str:
        return "\n".join(line.line for line in self.emulator.cloud.pods[pod.id].container.log.lines)


@pytest.fixture
def pods(client: RunPod, emulator: Emulator, volume: Volume) -> Pods:
    return Pods(client, emulator, volume)


def test_a_job_runs_once_with_everything_on_the_volume_and_the_pod_ends_itself(pods: Pods) -> None:
    shown = "import json, os; print('env ' + json.dumps(dict(os.environ)))"
    pod = pods.start(["{python}", "-c", shown])
    assert pods.outcome(pod) | {"ended": 0} == {
        "pod": pod.id,
        "run": "a-run",
        "status": 0,
        "reason": "the command ended with status 0",
        "ended": 0,
    }
    log = (pods.folder / PODS / pod.id / "log.txt").read_text()
    environment = json.loads(log.removeprefix("env "))
    for name in ("HOME", "TMPDIR", "PIP_CACHE_DIR", "HF_HOME", "XDG_CACHE_HOME", "TORCH_HOME"):
        assert environment[name].startswith(str(pods.folder)), name
    assert "RUNPOD_API_KEY" not in environment, "a job can end no pod"
    assert pods.emulator.cloud.pods[pod.id].key not in log + pods.log(pod)
    assert not (pods.folder / "tmp" / pod.id).exists(), "its temporary files are gone"


def test_a_container_that_is_started_again_does_not_run_its_job_again(pods: Pods, emulator: Emulator) -> None:
    emulator.cloud.faults.arm(Fault("restarts", after_s=1.0))
    pod = pods.start(["sh", "-c", f"echo ran >> {pods.folder}/runs; sleep 60"])
    assert "started again" in pods.outcome(pod)["reason"]
    assert (pods.folder / "runs").read_text() == "ran\n"
    assert emulator.cloud.pods[pod.id].container.starts == 2


@pytest.mark.parametrize("how", ["ends", "hangs on to its time"])
def test_the_deadline_ends_a_job_and_the_pod(pods: Pods, how: str) -> None:
    command = "sleep 60" if how == "ends" else "trap '' TERM; while true; do sleep 0.1; done"
    pod = pods.start(["sh", "-c", command], seconds=END_S + 2.0)  # END_S and a second's grace before its end it is stopped
    outcome = pods.outcome(pod)
    assert outcome["status"] != 0
    assert outcome["reason"].endswith("its time was over")


def test_a_container_that_is_started_again_keeps_its_deadline(pods: Pods, emulator: Emulator) -> None:
    """Where the mark of the first start is lost too: the time is an absolute one, and in the environment."""
    emulator.cloud.faults.arm(Fault("restarts", after_s=3.0))
    began = time.time()
    job = f"echo ran >> {pods.folder}/runs; rm {pods.folder}/{PODS}/$RUNPOD_POD_ID/{STARTED}; sleep 60"
    pod = pods.start(["sh", "-c", job], seconds=END_S + 6.0)
    outcome = pods.outcome(pod)
    assert emulator.cloud.pods[pod.id].container.starts == 2
    assert (pods.folder / "runs").read_text() == "ran\nran\n"
    assert outcome["reason"].endswith("its time was over")
    assert outcome["ended"] - began < 7.5, (
        "at 5 s (END_S and a second's grace before the deadline); counted from the second start it would be 8"
    )


def test_a_pod_that_hangs_before_its_job_is_ended_at_its_deadline(pods: Pods) -> None:
    code = pods.folder / "checkout"
    code.mkdir()
    os.mkfifo(code / "requirements.lock")  # to read it waits for ever, as on a network file system that has gone
    pod = pods.start(["true"], python=None, code_folder=str(code), lock="requirements.lock", seconds=4.0)
    pods.await_end(pod, timeout_s=30)
    assert "watchdog: the pod's time is over" in pods.log(pod)
    assert not (pods.folder / PODS / pod.id / OUTCOME).exists()


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ('#!/bin/sh\n[ "$1 $2" = "pod delete" ]', ""),
        ('#!/bin/sh\n[ "$1 $2" = "remove pod" ]', ""),
        ("#!/bin/sh\nexit 3", "status 3"),
        ("#!/nowhere\n", "No such file"),
    ],
)
def test_runpods_own_program_is_the_last_way_to_end_a_pod(tmp_path: Path, program: str, says: str) -> None:
    runpodctl = tmp_path / "runpodctl"
    runpodctl.write_text(program)
    runpodctl.chmod(0o755)
    pod = Pod({JOB_VARIABLE: json.dumps({"deadline": 0, "mount_path": str(tmp_path)}), "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    problem = pod._command()
    assert says in problem
    assert bool(problem) == bool(says)


def test_a_pod_whose_key_is_refused_tries_another_way(pods: Pods, emulator: Emulator) -> None:
    emulator.cloud.faults.arm(Fault("pod_key_refused", times=2))
    pod = pods.start(["true"])
    assert pods.outcome(pod)["status"] == 0
    log = pods.log(pod)
    assert log.count("HTTP Error 403") == 2, log  # a pod's id can hold the number too


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"volume": "other"}, "is {volume}, not other\n  where: "),
        ({"gpu_asked": {"id": A100, "count": 1}}, "no GPU answers"),
        ({"free_volume_gb": 1e9}, "GB free at"),
        ({"least_s": 1e6}, "its time is nearly over"),
    ],
)
def test_a_machine_that_is_not_what_was_asked_for_runs_nothing(pods: Pods, wrong: dict[str, Any], says: str) -> None:
    pod = pods.start(["touch", str(pods.folder / "ran")], **wrong)
    outcome = pods.outcome(pod)
    assert outcome["status"] == 2
    assert says.format(volume=pods.volume.id) in outcome["reason"]
    assert not (pods.folder / "ran").exists()


def test_a_server_that_the_pod_does_not_reach_is_found_before_any_work(pods: Pods, stack: Stack) -> None:
    known = stack.client_environment()
    there = {name: known[name] for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")}
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/api"
    Pod(environment_of(pods) | there).check_network()
    with pytest.raises(PreflightError, match=f"the Prefect API at {nobody} cannot be reached from the pod: .*refused"):
        Pod(environment_of(pods, retry_s=0.01) | there | {"PREFECT_API_URL": nobody}).check_network()


def test_gpus_are_counted_and_known_by_name(pods: Pods) -> None:
    two = GpuRequest(id=A100, count=2)
    cases = {
        "2 GPUs add up by gloo": {},
        "2 GPUs, 4 asked for": {"gpu_asked": {"id": A100, "count": 4}},
        f"the GPUs are {A100}, asked for was": {"gpu_asked": {"id": "NVIDIA H100 80GB HBM3", "count": 2}},
    }
    started = {says: pods.start(["true"], gpu=two, **wrong) for says, wrong in cases.items()}
    for says, pod in started.items():
        assert (pods.outcome(pod)["status"] == 0) == (not cases[says])
        assert says in pods.log(pod)


def test_gpus_that_cannot_exchange_numbers_run_nothing(pods: Pods) -> None:
    """Without the emulator's mark the check is NCCL's, which has no GPU here."""
    pod = Pod(environment_of(pods, gpu={"id": A100, "count": 2}))
    with pytest.raises(PreflightError, match=r"cannot exchange numbers by nccl: GPU 0: .*; GPU 1: "):
        pod.check_all_reduce(sys.executable)


def test_shards_that_are_not_what_was_made_are_found_before_any_work(pods: Pods) -> None:
    """Another pod would find the same, so that none is to be rented: a refusal, with the folder that the link leads to."""
    folder = pods.folder / "steps" / "shards-1"
    folder.mkdir(parents=True)
    (pods.folder / SHARDS).symlink_to(folder)
    content = b"one shard"
    (folder / "a.tar").write_bytes(content)
    entry = {"path": "a.tar", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    pod = Pod(environment_of(pods))
    pod.check_shards()
    (folder / "manifest.json").write_text(json.dumps({"files": [entry]}))
    pod.check_shards()
    cases = {b"two shard": "a.tar is not what was made", b"one": "a.tar has 3 bytes and not 9", None: "a.tar is missing"}
    for damaged, says in cases.items():
        (folder / "a.tar").unlink()
        if damaged is not None:
            (folder / "a.tar").write_bytes(damaged)
        with pytest.raises(PreflightError, match=says) as caught:
            pod.check_shards()
        assert is_user_error(str(caught.value))
        assert f"where: {folder}" in str(caught.value)
        assert ("machine.verify: sha256" in str(caught.value)) == (damaged == b"two shard"), "what a precompute by sizes does not find"


def environment_of(pods: Pods, **more: Any) -> dict[str, str]:
    """Of a pod's program that is called here and not on a pod."""
    return {JOB_VARIABLE: json.dumps({"deadline": 0, "mount_path": str(pods.folder)} | more), "PATH": os.environ["PATH"]}


def test_an_environment_is_made_once_whichever_pod_comes_first(pods: Pods) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as packed:
        content = b"# nothing to install\n"
        entry = tarfile.TarInfo("requirements.lock")
        entry.size = len(content)
        packed.addfile(entry, io.BytesIO(content))
    (pods.folder / CODE).mkdir()
    (pods.folder / CODE / "abc.tar.gz").write_bytes(archive.getvalue())
    given = {"python": None, "code": "abc", "lock": "requirements.lock", "setup_say_s": 0.2}
    both = [pods.start(["{python}", "-c", "import sys; print(sys.prefix)"], **given) for _ in range(2)]
    assert [pods.outcome(pod)["status"] for pod in both] == [0, 0]
    (folder,) = [one for one in (pods.folder / ENVIRONMENTS).iterdir() if one.is_dir()]
    prefixes = {(pods.folder / PODS / pod.id / "log.txt").read_text().strip().splitlines()[-1] for pod in both}
    assert prefixes == {str(folder)}
    assert sum("making the environment" in pods.log(pod) for pod in both) == 1
    for pod in both:
        said = [line.startswith(f"{PROGRAM_SAYS} {SETTING_UP}") for line in pods.log(pod).splitlines()]
        assert any(said), "the one that installs and the one that waits for it are not silent meanwhile"
        assert not any(said[said.index(True) + sum(said) :]), "no more of it when the job runs"
    assert (pods.folder / CODE / "abc" / "requirements.lock").is_file()
    third = pods.start(["true"], **given)
    assert pods.outcome(third)["status"] == 0
    assert "making the environment" not in pods.log(third)
    assert not list(pods.folder.glob(f"{ENVIRONMENTS}/*.lease*"))


def test_the_program_fits_into_an_environment_variable() -> None:
    packed = base64.b64encode(zlib.compress((REPOSITORY / "infra" / "runpod" / "pod.py").read_bytes(), 9))
    assert len(packed) < 16_000
