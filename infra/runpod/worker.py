"""Prefect's work-pool type `runpod`: one flow run is one pod.

    prefect work-pool create fvlm-gpu --type runpod
    prefect worker start --pool fvlm-gpu

The worker rents a pod for a run (`rent`), looks at all pods with one request every few seconds, streams their logs into the runs' logs, and
ends a pod whose run is over, cancelled, or lost. A pod whose run is not over is a crash, with the reason that the pod left on the volume. A
worker that is started anew goes on with the pods of the one before.
"""

import asyncio
import base64
import contextlib
import json
import re
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import resources
from typing import Annotated, Any
from urllib.parse import urlsplit
from uuid import UUID

import anyio
import anyio.abc
import anyio.to_thread
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import Flow, FlowRun, StateType, WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.exceptions import InfrastructureNotAvailable, InfrastructureNotFound, ObjectNotFound
from prefect.states import Cancelled
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult
from pydantic import Field, SecretStr

from infra.board import Board
from infra.budget import Budget
from infra.errors import InfraError, RefusedError
from infra.runpod.account import Account, Place
from infra.runpod.client import API_URL, RunPod
from infra.runpod.errors import RunPodError
from infra.runpod.models import MAX_VARIABLES, GpuRequest, Pod, Volume
from infra.runpod.naming import PodName, owner
from infra.runpod.rent import Candidate, Wish, rent
from infra.runpod.watch import Watch

PROGRAM_VARIABLE = "FVLM_POD_PROGRAM"
START = f"""python3 -c 'import base64,os,zlib;exec(zlib.decompress(base64.b64decode(os.environ["{PROGRAM_VARIABLE}"])))'"""
"""The container's command: the pod's program, which its environment holds."""
DEFAULT_COMMAND = "{python} -m prefect.engine"
"""The flow's code is there already: `prefect flow-run execute`, Prefect's own default, would copy it first."""
POLL_S = 15.0
"""Between two lists of all pods; RunPod allows 60 requests a minute."""
RECOVER_S = 15.0
"""Between two looks for runs that a worker before this one has left."""
ALIVE = timedelta(seconds=90)
"""Since a worker's last heartbeat, of which it sends one every 30 seconds; and what a run's submission may take to begin."""
RUN_LOOK_S = 5.0
"""Between two looks at a flow run's state."""
HEARTBEAT = "prefect.flow-run.heartbeat"
LINGER_S = 60.0
"""For a pod to end itself when its run is over."""
CANCEL_S = 20.0
"""For a cancelled run to end itself; then its pod is ended."""
OF_PREFECT = re.compile(r"\d\d:\d\d:\d\d\.\d{3} \| \w+ +\| ")
"""Lines that the run has sent to the server itself."""
LOCAL_HOSTS = ("localhost", "127.", "0.0.0.0", "[::1]", "10.", "192.168.")
KEPT_OF_PREFECT = (
    "PREFECT__",
    "PREFECT_API_",
    "PREFECT_CLIENT_",
    "PREFECT_FLOWS_",
    "PREFECT_LOGGING_",
    "PREFECT_RESULTS_",
    "PREFECT_TASKS_",
)
KEPT_OF_PREFECT_TOO = ("PREFECT_UI_URL", "PREFECT_SERVER_EPHEMERAL_ENABLED", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE")
"""Of the worker's own settings: not its server's database, not its folders."""


def _secret(description: str) -> Any:
    return Field(default=None, description=description)


class RunPodVariables(BaseVariables):
    """What can be set of a pool, a deployment, or a single run."""

    image: str = Field(default="runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404", description="Container image; a digest pins it.")
    gpus: list[str] = Field(default_factory=list, description="GPUs in order of preference, by RunPod's ids; none for a CPU pod.")
    gpu_count: Annotated[int, Field(ge=1)] = Field(default=1, description="GPUs on the pod.")
    min_cuda: str | None = Field(default=None, description="Lowest CUDA version of the machine, e.g. 12.8.")
    cpus: list[str] = Field(default_factory=list, description="CPU flavours in order of preference, for a pod without a GPU.")
    vcpus: Annotated[int, Field(ge=2)] = Field(default=2, description="vCPUs of a CPU pod, a power of two.")
    disk_gb: Annotated[int, Field(ge=1)] = Field(default=20, description="The container's own disk; wiped at every start.")
    volume: str = Field(default="fvlm", description="Name or id of the network volume; `fvlm infra setup` makes it.")
    mount_path: str = Field(default="/workspace", description="Where the volume is mounted.")
    max_usd_per_hour: Annotated[float, Field(gt=0)] = Field(default=5.0, description="No pod above this price.")
    max_runtime_h: Annotated[float, Field(gt=0)] = Field(default=24.0, description="Absolute: the pod is ended then, whatever it does.")
    capacity_wait_s: Annotated[float, Field(ge=0)] = Field(default=1800.0, description="How long to wait for a free machine.")
    start_timeout_s: Annotated[float, Field(gt=0)] = Field(default=1200.0, description="How long a pod may take to start.")
    idle_gpu_s: Annotated[float, Field(gt=0)] | None = Field(default=3600.0, description="End a pod whose GPUs do nothing for so long.")
    silent_s: Annotated[float, Field(gt=0)] | None = Field(default=1800.0, description="End a pod whose run gives no sign of life.")
    budget_usd: Annotated[float, Field(gt=0)] = Field(default=500.0, description="Nothing starts that could pass this sum.")
    budget_reserve_usd: Annotated[float, Field(ge=0)] = Field(default=15.0, description="Part of the budget that stays untouched.")
    code: str | None = Field(default=None, description="Code on the volume, as `fvlm infra code` put it there; none: the image's.")
    code_folder: str | None = Field(default=None, description="Where the code is in the image, where `code` is not given.")
    python: str | None = Field(default=None, description="Interpreter in the image; none: an environment on the volume.")
    lock: str = Field(default="requirements.lock", description="Lock file, in the code, that the environment on the volume is made of.")
    registry: str | None = Field(default=None, description="Id of RunPod's credentials for a private image.")
    free_volume_gb: Annotated[float, Field(ge=0)] = Field(default=5.0, description="Space on the volume below which no job starts.")
    runpod_url: str = Field(default=API_URL, description="RunPod's API, or an emulator's.")
    s3_url: str | None = Field(default=None, description="The volume's S3 side; none: RunPod's in the volume's data centre.")
    volume_folder: str | None = Field(default=None, description="Where the volume is mounted at the worker; none: S3.")
    poll_s: Annotated[float, Field(gt=0)] = Field(default=POLL_S, description="Between two looks at the pods.")
    api_key: SecretStr | None = _secret("RunPod's key, as a Prefect block: {{ prefect.blocks.secret.NAME }}; none: RUNPOD_API_KEY.")
    s3_access_key: str | None = Field(default=None, description="Of the volume's S3 side; none: RUNPOD_S3_ACCESS_KEY.")
    s3_secret_key: SecretStr | None = _secret("Of the volume's S3 side, as a Prefect block; none: RUNPOD_S3_SECRET_KEY.")


class RunPodConfiguration(BaseJobConfiguration, RunPodVariables):
    """A flow run's pod."""

    def prepare_for_flow_run(
        self,
        flow_run: FlowRun,
        deployment: DeploymentResponse | None = None,
        flow: Flow | None = None,
        work_pool: WorkPool | None = None,
        worker_name: str | None = None,
        worker_id: UUID | None = None,
    ) -> None:
        """Fill in what depends on the flow run."""
        own = set(self.env)
        super().prepare_for_flow_run(flow_run, deployment, flow, work_pool, worker_name, worker_id=worker_id)
        kept: dict[str, str | None] = {name: value for name, value in self.env.items() if value and (name in own or _for_pods(name))}
        if len(kept) > MAX_VARIABLES - 3:
            raise RefusedError(
                f"{len(kept)} environment variables; a pod takes {MAX_VARIABLES - 3} beside its own",
                where="env of the job variables",
                fix="give fewer",
            )
        self.env = kept

    @property
    def place(self) -> Place:
        """Where RunPod and the volume are, and the keys to them."""
        return Place(
            volume=self.volume,
            runpod_url=self.runpod_url,
            s3_url=self.s3_url,
            folder=self.volume_folder,
            key=self.api_key,
            s3_access_key=self.s3_access_key,
            s3_secret_key=self.s3_secret_key,
        )

    @property
    def wish(self) -> Wish:
        """The machine."""
        program = resources.files("infra.runpod").joinpath("pod.py").read_bytes()
        return Wish(
            image=self.image,
            gpus=self.gpus,
            gpu_count=self.gpu_count,
            cpus=self.cpus,
            vcpus=self.vcpus,
            disk_gb=self.disk_gb,
            max_usd_per_hour=self.max_usd_per_hour,
            min_cuda=self.min_cuda,
            registry=self.registry,
            args=START,
            env={name: value for name, value in self.env.items() if value is not None}
            | {PROGRAM_VARIABLE: base64.b64encode(zlib.compress(program, 9)).decode(), "FVLM_RUNPOD_URL": self.runpod_url},
        )

    def job(self, run: UUID, volume: Volume, deadline: float, machine: Candidate) -> str:
        """What the pod's program is to do."""
        command = DEFAULT_COMMAND if self.command in (None, self._base_flow_run_command()) else self.command or ""
        return json.dumps(
            {
                "run": str(run),
                "deadline": deadline,
                "volume": volume.id,
                "mount_path": self.mount_path,
                "command": command.split(),
                "code": self.code,
                "code_folder": self.code_folder,
                "python": self.python,
                "lock": self.lock,
                "gpu": {"id": machine.kind.id, "count": machine.kind.count} if isinstance(machine.kind, GpuRequest) else None,
                "free_volume_gb": self.free_volume_gb,
                "free_disk_gb": 0.5,
            }
        )


class RunPodResult(BaseWorkerResult):
    """How a pod ended: 0 where its run had ended before."""


class RunPodWorker(BaseWorker[RunPodConfiguration, RunPodVariables, RunPodResult]):
    """Runs flow runs on RunPod's pods."""

    type = "runpod"
    job_configuration = RunPodConfiguration
    job_configuration_variables = RunPodVariables
    _display_name = "RunPod"
    _description = "Run flow runs on rented pods of RunPod, one pod per run, on a network volume, within a budget."
    _documentation_url = "https://docs.runpod.io"
    _logo_url = "https://avatars.githubusercontent.com/u/95939477"

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._tenancies: dict[str, Tenancy] = {}
        self._mine: set[UUID] = set()
        self._recovery: asyncio.Task[None] | None = None

    async def __aexit__(self, *error: Any) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
        try:
            await super().__aexit__(*error)
        finally:
            for tenancy in self._tenancies.values():
                tenancy.poller.close()

    async def _initialize_after_sync(self) -> None:
        first = not self._has_successfully_synced
        await super()._initialize_after_sync()
        if first and self._has_successfully_synced and self._recovery is None:
            self._recovery = asyncio.create_task(self._recover())

    async def run(
        self, flow_run: FlowRun, configuration: RunPodConfiguration, task_status: anyio.abc.TaskStatus[Any] | None = None
    ) -> RunPodResult:
        """Rent a pod for the run and stay with it to its end.

        What is wrong with the settings, the budget or the keys is raised before anything is rented; the run is Crashed with that message.
        """
        log = self.get_flow_run_logger(flow_run)
        self._mine.add(flow_run.id)
        _check_reachable(configuration)
        tenancy = await self._tenancy(configuration)
        volume, budget = tenancy.volume, tenancy.budget.capped(configuration.budget_usd, configuration.budget_reserve_usd)

        def warn(line: str) -> None:
            log.warning(line)
            tenancy.post(line)

        def rented() -> tuple[Pod, PodName]:
            budget.storage(volume.id, volume.usd_per_hour)
            return rent(
                tenancy.account.client,
                configuration.wish,
                budget,
                run=flow_run.id,
                volume=volume,
                mount_path=configuration.mount_path,
                max_runtime_s=configuration.max_runtime_h * 3600,
                phase=configuration.labels.get("prefect.io/flow-name", ""),
                wait_s=configuration.capacity_wait_s,
                say=log.info,
                warn=warn,
                environment=lambda deadline, machine: {"FVLM_POD_JOB": configuration.job(flow_run.id, volume, deadline, machine)},
            )

        pod, name = await anyio.to_thread.run_sync(rented)
        if task_status is not None:
            task_status.started(pod.id)
        await anyio.to_thread.run_sync(tenancy.post, f"{flow_run.name} runs on pod {pod.id} for ${pod.cost:.2f}/h")
        return await self._stay(flow_run, configuration, tenancy, pod, name)

    async def kill_infrastructure(self, infrastructure_pid: str, configuration: RunPodConfiguration, grace_seconds: int = 30) -> None:
        """End the run's pod."""
        try:
            client = (await self._tenancy(configuration)).account.client
            if not await anyio.to_thread.run_sync(client.terminate, infrastructure_pid):
                raise InfrastructureNotFound(f"the pod {infrastructure_pid} is gone")
        except InfraError as error:
            raise InfrastructureNotAvailable(str(error)) from error

    async def _stay(
        self, flow_run: FlowRun, configuration: RunPodConfiguration, tenancy: "Tenancy", pod: Pod, name: PodName
    ) -> RunPodResult:
        """Stay with a pod to its end, and see that it has one."""
        log, account = self.get_flow_run_logger(flow_run), tenancy.account
        watch = Watch(
            deadline=name.deadline,
            began=time.time(),
            start_timeout_s=configuration.start_timeout_s,
            idle_s=configuration.idle_gpu_s if configuration.gpus else None,
            silent_s=configuration.silent_s,
        )
        with reading_logs(account.client, pod.id, log.info):
            try:
                crashed = await self._until_over(flow_run, tenancy.poller, watch, pod.id)
            except BaseException:
                # this worker is being stopped: the pod ends itself, and the next worker looks after it
                log.info("the worker leaves the pod %s to itself", pod.id)
                raise
        await ended(account, tenancy.budget, pod.id, str(name), log.warning)
        outcome = await anyio.to_thread.run_sync(account.outcome, pod.id)
        reason = f"{crashed}{f'; {outcome}' if outcome else ''}" if crashed else ""
        if not crashed:
            log.info("the pod %s has ended", pod.id)
            await anyio.to_thread.run_sync(tenancy.post, f"{flow_run.name} has ended, and its pod {pod.id} with it")
            return RunPodResult(identifier=pod.id, status_code=0)
        log.error("the pod %s was lost: %s", pod.id, reason)
        await anyio.to_thread.run_sync(tenancy.post, f"BLOCKER: {flow_run.name}: its pod {pod.id} was lost: {reason}")
        await self._propose_crashed_state(flow_run, f"pod {pod.id}: {reason}")
        return RunPodResult(identifier=pod.id, status_code=1)

    async def _until_over(self, flow_run: FlowRun, poller: "Poller", watch: Watch, pod: str) -> str | None:
        """Wait until the run or its pod is over. Returns why the pod is lost, or None where the run ended by itself or was cancelled."""
        over_since: float | None = None
        looked = 0.0
        async for pods in poller.looks(pod):
            now = time.time()
            problem = watch.look(pods.get(pod), now)
            if problem or now - looked >= RUN_LOOK_S:
                looked = now
                state, sign = await self._run_of(flow_run.id)
                if state is None or state in FINAL:
                    over_since = over_since or now
                elif state == StateType.CANCELLING:
                    over_since = over_since or now
                    if problem or now - over_since > CANCEL_S:
                        await self._cancelled(flow_run.id)
                        return None
                else:
                    problem = problem or watch.hear(sign, now)
            if over_since is not None:
                if problem or now - over_since > LINGER_S:
                    return None
            elif problem:
                return problem
        return None

    async def _run_of(self, run: UUID) -> tuple[StateType | None, object]:
        """The run's state, None where it was deleted, SCHEDULED where the server does not say; and its newest sign of life."""
        try:
            found = await self.client.read_flow_run(run)
            wanted = EventFilter(event=EventNameFilter(name=[HEARTBEAT]), resource=EventResourceFilter(id=[f"prefect.flow-run.{run}"]))
            beats = (await self.client.read_events(filter=wanted, limit=1)).events
        except ObjectNotFound:
            return None, None
        except Exception:  # the server is away: the pod goes on
            return StateType.SCHEDULED, time.time()
        state = found.state
        return (state.type if state else StateType.SCHEDULED), (state and state.id, beats and beats[0].occurred)

    async def _cancelled(self, run: UUID) -> None:
        with contextlib.suppress(Exception):
            await self.client.set_flow_run_state(run, Cancelled(message="cancelled; its pod was ended"), force=True)

    async def _recover(self) -> None:
        """What a worker before this one has left: its pods, and runs that it had taken and not yet given a pod."""
        await self._adopt()
        while True:
            await asyncio.sleep(RECOVER_S)
            with contextlib.suppress(Exception):  # the server is away; there is a next time
                await self._crash_forgotten()

    async def _crash_forgotten(self) -> None:
        """Mark runs Crashed that are pending, and that no living worker of the pool can have taken: nobody else ever would."""
        now = datetime.now(UTC)
        for worker in await self.client.read_workers_for_work_pool(self._work_pool_name):
            if worker.name != self.name and worker.last_heartbeat_time and now - worker.last_heartbeat_time < ALIVE:
                return
        pending = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING])))
        pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[self._work_pool_name]))
        for run in await self.client.read_flow_runs(flow_run_filter=pending, work_pool_filter=pool):
            known = run.id in self._mine or run.id in self._submitting_flow_run_ids or run.infrastructure_pid is not None
            if not known and run.state is not None and now - run.state.timestamp > ALIVE:
                await self._propose_crashed_state(run, "the worker that had taken the run was lost before it had a pod")

    async def _adopt(self) -> None:
        """Go on with pods that a worker before this one rented for runs of this pool."""
        try:
            configuration = await RunPodConfiguration.from_template_and_values(self.work_pool.base_job_template, {}, client=self.client)
            tenancy = await self._tenancy(configuration)
            pods = await anyio.to_thread.run_sync(tenancy.account.client.pods)
        except Exception as error:  # there is no pool-wide account: each run brings its own
            self._logger.debug("no pods are taken over: %s", error)
            return
        for pod in pods:
            name = PodName.parse(pod.name)
            if name is None or name.owner != owner(tenancy.volume.id) or pod.id in tenancy.poller.watched:
                continue
            with contextlib.suppress(ObjectNotFound):
                run = await self.client.read_flow_run(name.run)
                if run.work_pool_name == self._work_pool_name and run.infrastructure_pid == pod.id and self._runs_task_group:
                    self._logger.info("goes on with the pod %s of the flow run %s", pod.id, run.name)
                    self._mine.add(run.id)
                    self._runs_task_group.start_soon(self._stay, run, configuration, tenancy, pod, name)

    async def _tenancy(self, configuration: RunPodConfiguration) -> "Tenancy":
        """What all runs of this worker with the same account and volume share."""
        place = configuration.place
        if place.identity not in self._tenancies:
            account = Account(place)
            volume = await anyio.to_thread.run_sync(account.volume)
            budget = Budget(account.store, cap_usd=configuration.budget_usd, reserve_usd=configuration.budget_reserve_usd)
            poller = Poller(account.client, configuration.poll_s, self._logger.warning)
            self._tenancies.setdefault(place.identity, Tenancy(account, volume, budget, poller, Board(account.store, "LOCAL")))
        return self._tenancies[place.identity]


@dataclass(frozen=True)
class Tenancy:
    """An account of RunPod's with one of its volumes, as the runs of a worker share it."""

    account: Account
    volume: Volume
    budget: Budget
    poller: "Poller"
    board: Board

    def post(self, text: str) -> None:
        """Tell the volume's board; that it cannot be told stops nothing."""
        with contextlib.suppress(InfraError, OSError):
            self.board.post(text)


FINAL = frozenset({StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED})


class Poller:
    """One list of all pods for all who watch one; silent while nobody does."""

    def __init__(self, client: RunPod, interval_s: float, warn: Callable[[str], None]) -> None:
        self.client, self.interval_s, self.warn = client, interval_s, warn
        self.watched: set[str] = set()
        self._news = asyncio.Condition()
        self._pods: dict[str, Pod] = {}
        self._task: asyncio.Task[None] | None = None

    async def looks(self, pod: str) -> AsyncIterator[dict[str, Pod]]:
        """All pods by id, again with every new list. While the API is away there is none, and nothing is concluded from that."""
        self.watched.add(pod)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._poll())
        try:
            while True:
                async with self._news:
                    await self._news.wait()
                yield self._pods
        finally:
            self.watched.discard(pod)

    def close(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()

    async def _poll(self) -> None:
        while self.watched:
            try:
                self._pods = {pod.id: pod for pod in await anyio.to_thread.run_sync(self.client.pods)}
            except RunPodError as error:
                self.warn(f"RunPod does not answer; pods go on: {error.what}")
            else:
                async with self._news:
                    self._news.notify_all()
            await asyncio.sleep(self.interval_s)


async def ended(account: Account, budget: Budget, pod: str, name: str, warn: Callable[[str], None]) -> None:
    """End the pod, however long RunPod takes to hear of it, and write it down."""
    delay_s = 1.0
    while True:
        try:
            await anyio.to_thread.run_sync(account.client.terminate, pod)
            break
        except RunPodError as error:
            warn(f"the pod {pod} could not be ended, tried again: {error.what}")
            await asyncio.sleep(delay_s)
            delay_s = min(60.0, delay_s * 2)
    await anyio.to_thread.run_sync(budget.ended, name)


@contextlib.contextmanager
def reading_logs(client: RunPod, pod: str, say: Callable[[str], None]) -> Any:
    """While in the block, give what the pod prints to `say`, but for what its run has logged itself."""
    over = threading.Event()

    def read() -> None:
        last: str | None = None
        while not over.is_set():
            with contextlib.suppress(RunPodError):
                for line in client.logs(pod, after=last, tail=1000):
                    last = line.id
                    if not OF_PREFECT.match(line.line):
                        say(f"{line.source}: {line.line}" if line.source == "system" else line.line)
                    if over.is_set():
                        return
            over.wait(3.0)

    threading.Thread(target=read, name=f"log-{pod}", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _for_pods(name: str) -> bool:
    """Whether a setting of the worker is meant for the run too."""
    return not name.startswith("PREFECT_") or name.startswith(KEPT_OF_PREFECT)


def _check_reachable(configuration: RunPodConfiguration) -> None:
    """A server on this machine cannot be reached from a pod elsewhere."""
    url = configuration.env.get("PREFECT_API_URL") or ""
    local = (urlsplit(url).hostname or "").startswith(LOCAL_HOSTS)
    if local and configuration.runpod_url == API_URL:
        raise RefusedError(
            f"the Prefect API at {url} cannot be reached from a pod",
            where="PREFECT_API_URL of the worker",
            fix="use a server that pods can reach: `fvlm infra up`, Prefect Cloud, or any public one",
        )
