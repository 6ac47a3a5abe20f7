"""A worker of the pool type `runpod` on an emulated RunPod, with a deployment of a tiny flow; everything is real but the machines."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Scheduled
from prefect.types.entrypoint import EntrypointType

from infra.budget import Budget
from infra.runpod.client import RunPod
from infra.runpod.emulator.faults import Fault
from infra.runpod.emulator.server import Emulator
from infra.runpod.models import CreateVolume
from infra.runpod.pod import IDENTITY
from infra.runpod.worker import RunPodWorker
from infra.stack import REPOSITORY, Stack
from infra.store import FolderStore
from tests.infra.runpod.tiny_flow import tiny
from tests.waiting import EVENT_TIMEOUT_S, wait_until

PLANTED = "planted-value-that-must-not-appear"


@dataclass
class Rig:
    """Use as a context manager."""

    stack: Stack
    emulator: Emulator
    variables: dict[str, Any] = field(default_factory=dict)
    program: str = "prefect"
    """Module that runs the worker."""
    pool: str = field(default_factory=lambda: f"pool-{uuid4().hex[:8]}")
    worker: subprocess.Popen[bytes] | None = None
    open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __post_init__(self) -> None:
        self.client = RunPod(self.emulator.key, self.emulator.url)
        self.volume = self.client.create_volume(CreateVolume(name="fvlm", size=100, dataCenter="US-KS-2"))
        self.folder = self.emulator.cloud.volumes[self.volume.id].folder
        FolderStore(self.folder).write(IDENTITY, f'{{"id": "{self.volume.id}"}}'.encode())
        known = {
            "cpus": ["cpu3c"],
            "volume": self.volume.id,
            "mount_path": str(self.folder),
            "volume_folder": str(self.folder),
            "runpod_url": self.emulator.url,
            "python": sys.executable,
            "code_folder": str(REPOSITORY),
            "max_usd_per_hour": 4.0,
            "max_runtime_h": 1.0,
            "poll_s": 0.3,
            "start_timeout_s": 60.0,
            "capacity_wait_s": 0.0,
            "free_volume_gb": 0.0,
            "env": {"PLANTED": PLANTED, "OMP_NUM_THREADS": "1"},
        }
        self.variables = known | self.variables

    def __enter__(self) -> "Rig":
        template = RunPodWorker.get_default_base_job_template()
        for name, value in self.variables.items():
            template["variables"]["properties"][name]["default"] = value
        self.prefect = self.open.enter_context(get_client(sync_client=True))
        self.prefect.create_work_pool(WorkPoolCreate(name=self.pool, type="runpod", base_job_template=template))
        self.deployment = tiny.to_deployment(self.pool, work_pool_name=self.pool, entrypoint_type=EntrypointType.MODULE_PATH).apply()
        return self

    def __exit__(self, *_error: object) -> None:
        self.kill_worker(signal.SIGTERM)
        self.open.close()
        self.client.close()

    @property
    def environment(self) -> dict[str, str]:
        """Of the worker."""
        return (
            os.environ
            | self.stack.client_environment()
            | {"RUNPOD_API_KEY": self.emulator.key, "PREFECT_HOME": str(self.stack.home / "worker")}
        )

    @property
    def log(self) -> Path:
        return self.stack.home / f"{self.pool}.log"

    @property
    def budget(self) -> Budget:
        return Budget(FolderStore(self.folder), cap_usd=500, reserve_usd=15)

    def start_worker(self) -> None:
        arguments = [sys.executable, "-m", self.program, "worker", "start", "--pool", self.pool]
        with self.log.open("ab") as log:
            self.worker = subprocess.Popen(arguments, env=self.environment, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT)

    def kill_worker(self, number: int) -> None:
        if self.worker is not None:
            self.worker.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.worker.wait(20)
            if self.worker.poll() is None:
                self.worker.kill()
            self.worker = None

    def submit(self, name: str, *, fault: Fault | None = None, variables: dict[str, Any] | None = None, **parameters: Any) -> FlowRun:
        """A run of the tiny flow, whose pod the fault strikes."""
        given = {"folder": str(self.folder / "work" / name), **parameters}
        soon = Scheduled(scheduled_time=datetime.now(UTC) + timedelta(seconds=1))
        run = self.prefect.create_flow_run_from_deployment(
            self.deployment, parameters=given, job_variables=variables, name=name, state=soon
        )
        if fault:
            self.emulator.cloud.faults.arm(replace(fault, where=run.id.hex))
        return run

    def state(self, run: UUID) -> State[Any]:
        state = self.prefect.read_flow_run(run).state
        assert state is not None
        return state

    def finish(self, run: UUID, timeout_s: float = EVENT_TIMEOUT_S) -> State[Any]:
        wait_until(lambda: self.state(run).is_final(), f"the run to end\n{self.tail()}", timeout_s, poll_s=0.5)
        return self.state(run)

    def wait_for_no_pods(self, timeout_s: float = EVENT_TIMEOUT_S) -> None:
        wait_until(lambda: not self.client.pods(), f"the pods to end\n{self.tail()}", timeout_s)

    def tail(self) -> str:
        return self.log.read_text()[-6000:] if self.log.exists() else ""

    def run_logs(self, run: UUID) -> list[str]:
        asked = {"logs": {"flow_run_id": {"any_": [str(run)]}}, "sort": "TIMESTAMP_ASC"}
        auth = tuple(self.stack.client_environment()["PREFECT_API_AUTH_STRING"].split(":", 1))
        return [one["message"] for one in httpx.post(f"{self.stack.api_url}/logs/filter", json=asked, auth=auth).json()]


@contextlib.contextmanager
def working(rig: Rig) -> Iterator[Rig]:
    """The rig with its worker running."""
    with rig:
        rig.start_worker()
        yield rig
