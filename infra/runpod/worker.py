"""Prefect's work-pool type `runpod`: one flow run is one pod.

    prefect work-pool create fvlm-gpu --type runpod
    prefect worker start --pool fvlm-gpu

The worker rents a pod for each run (`rent`), polls all pods with one request every few seconds, streams their logs into the runs' logs, and
ends a pod whose run is over, cancelled, or lost. If a pod ends before its run, the run is marked as crashed, with the reason that the pod
left on the volume. A restarted worker takes over the pods of the previous one.
"""

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import anyio
import anyio.abc
import anyio.from_thread
import anyio.to_thread
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.exceptions import InfrastructureNotAvailable, InfrastructureNotFound, ObjectNotFound
from prefect.states import Cancelled, Crashed
from prefect.workers.base import BaseWorker, BaseWorkerResult

from infra.board import Board
from infra.budget import Budget
from infra.errors import InfraError, RefusedError
from infra.runpod.account import Account
from infra.runpod.errors import WrongKeyError
from infra.runpod.models import Pod, Volume
from infra.runpod.naming import PodName, owner
from infra.runpod.poller import SYSTEM_SAYS, Poller, ended, reading_logs
from infra.runpod.pool import RunPodConfiguration, RunPodVariables
from infra.runpod.rent import rent
from infra.runpod.watch import GONE_LOOKS, UNSTARTED, Watch

RECOVER_S = 15.0
"""Interval between two checks for runs that a previous worker has left behind."""
ALIVE = timedelta(seconds=90)
"""A worker is alive this long after its last heartbeat, which it sends every 30 seconds. Also how long a run may be pending before it is
submitted."""
RUN_LOOK_S = 5.0
"""Interval between two checks of a flow run's state."""
HEARTBEAT = "prefect.flow-run.heartbeat"
LINGER_S = 60.0
"""Time in which a pod may end itself after its run is over."""
LAST_WORDS_S = 75.0
"""Time in which the run of a lost pod may still set its own state: after the signal, a job has a minute to end."""
CANCEL_S = 20.0
"""Time in which a cancelled run may end itself before its pod is ended."""
FINAL = frozenset({StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED})
ON_A_POD = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
"""States of a run that has a pod. The run is pending until its process starts there."""


class RunPodResult(BaseWorkerResult):
    """How a pod ended: status code 0 if its run had ended before."""


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
        self._contexts: dict[str, AccountContext] = {}
        self._mine: set[UUID] = set()
        self._recovery: asyncio.Task[None] | None = None

    async def __aexit__(self, *error: Any) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
        try:
            await super().__aexit__(*error)
        finally:
            for context in self._contexts.values():
                context.poller.close()

    async def _initialize_after_sync(self) -> None:
        first = not self._has_successfully_synced
        await super()._initialize_after_sync()
        if first and self._has_successfully_synced and self._recovery is None:
            self._recovery = asyncio.create_task(self._recover())

    async def run(
        self, flow_run: FlowRun, configuration: RunPodConfiguration, task_status: anyio.abc.TaskStatus[Any] | None = None
    ) -> RunPodResult:
        """Rent a pod for the run and watch it to its end.

        Errors in the settings, the budget or the keys are raised before anything is rented; the run is then Crashed with that message.
        """
        log = self.get_flow_run_logger(flow_run)
        self._mine.add(flow_run.id)
        configuration.check_reachable()
        await anyio.to_thread.run_sync(configuration.check_image)
        context = await self._context(configuration)
        volume, budget = context.volume, context.budget.capped(configuration.budget_usd, configuration.budget_reserve_usd)

        def warn(line: str) -> None:
            log.warning(line)
            context.post(line)

        def rented() -> tuple[Pod, PodName]:
            budget.storage(volume.id, volume.usd_per_hour)
            return rent(
                context.account.client,
                configuration.requirements,
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
                go_on=lambda: anyio.from_thread.run(self._wanted, flow_run.id),
            )

        pod, name = await anyio.to_thread.run_sync(rented)
        if task_status is not None:
            task_status.started(pod.id)
        await anyio.to_thread.run_sync(context.post, f"{flow_run.name} runs on pod {pod.id} for ${pod.cost:.2f}/h")
        return await self._stay(flow_run, configuration, context, pod, name)

    async def kill_infrastructure(self, infrastructure_pid: str, configuration: RunPodConfiguration, grace_seconds: int = 30) -> None:
        """End the run's pod."""
        try:
            client = (await self._context(configuration)).account.client
            if not await anyio.to_thread.run_sync(client.terminate, infrastructure_pid):
                raise InfrastructureNotFound(f"the pod {infrastructure_pid} is gone")
        except InfraError as error:
            raise InfrastructureNotAvailable(str(error)) from error

    async def _stay(
        self, flow_run: FlowRun, configuration: RunPodConfiguration, context: "AccountContext", pod: Pod, name: PodName
    ) -> RunPodResult:
        """Watch a pod to its end, and make sure that it ends."""
        log, account = self.get_flow_run_logger(flow_run), context.account
        watch = Watch(
            deadline=name.deadline,
            began=time.time(),
            start_timeout_s=configuration.start_timeout_s,
            idle_s=configuration.idle_gpu_s if configuration.gpus else None,
            silent_s=configuration.silent_s,
        )
        system: deque[str] = deque(maxlen=1)

        def said(line: str) -> None:
            log.info(line)
            watch.read(line)
            system.extend([line] if line.startswith(SYSTEM_SAYS) else [])

        with reading_logs(account.client, pod.id, said):
            try:
                crashed = await self._until_over(flow_run, context.poller, watch, pod.id)
            except BaseException:
                # this worker is being stopped: the pod ends itself, and the next worker looks after it
                log.info("the worker leaves the pod %s to itself", pod.id)
                raise
        await ended(account, context.budget, pod.id, str(name), log.warning)
        outcome = await anyio.to_thread.run_sync(account.outcome, pod.id)
        if not crashed:
            log.info("the pod %s has ended", pod.id)
            await anyio.to_thread.run_sync(context.post, f"{flow_run.name} has ended, and its pod {pod.id} with it")
            return RunPodResult(identifier=pod.id, status_code=0)
        hint = f"if its image {configuration.image} cannot be pulled, correct it or give its `registry`" if UNSTARTED in crashed else ""
        reason = "; ".join(part for part in (crashed, outcome, *system, hint) if part)
        log.error("the pod %s was lost: %s", pod.id, reason)
        await anyio.to_thread.run_sync(context.post, f"BLOCKER: {flow_run.name}: its pod {pod.id} was lost: {reason}")
        message = f"pod {pod.id}: {reason}"
        if await self._crash(flow_run.id, pod.id, message) and self._runs_task_group:
            self._runs_task_group.start_soon(self._crash_again, flow_run.id, pod.id, message)
        return RunPodResult(identifier=pod.id, status_code=1)

    async def _until_over(self, flow_run: FlowRun, poller: Poller, watch: Watch, pod: str) -> str | None:
        """Wait until the run or its pod is over. Returns why the pod is lost, or None if the run ended by itself or was cancelled."""
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
                        await self._cancelled(flow_run.id, "its pod was ended")
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
        """Return the run's state (None if it was deleted, SCHEDULED if the server does not answer) and its newest sign of life."""
        try:
            found = await self.client.read_flow_run(run)
            wanted = EventFilter(event=EventNameFilter(name=[HEARTBEAT]), resource=EventResourceFilter(id=[f"prefect.flow-run.{run}"]))
            beats = (await self.client.read_events(filter=wanted, limit=1)).events
        except ObjectNotFound:
            return None, None
        except Exception:  # the server does not answer: the pod continues
            return StateType.SCHEDULED, time.time()
        state = found.state
        return (state.type if state else StateType.SCHEDULED), (state and state.id, beats and beats[0].occurred)

    async def _wanted(self, run: UUID) -> bool:
        """Return whether a run that waits for a machine still wants one. Marks a run that is being cancelled, which has no process yet."""
        state, _ = await self._run_of(run)
        if state == StateType.CANCELLING:
            await self._cancelled(run, "it had no pod yet")
        return state not in (None, StateType.CANCELLING, *FINAL)

    async def _cancelled(self, run: UUID, message: str) -> None:
        with contextlib.suppress(Exception):
            await self.client.set_flow_run_state(run, Cancelled(message=f"cancelled; {message}"), force=True)

    async def _crash(self, run: UUID, pod: str, message: str) -> bool:
        """Mark the pod's run as Crashed with this message, replacing the message of an earlier crash.

        Returns False if the run now has another pod or has ended otherwise.
        """
        with contextlib.suppress(Exception):  # the server does not answer
            found = await self.client.read_flow_run(run)
            if found.infrastructure_pid != pod or found.state is None or (found.state.is_final() and not found.state.is_crashed()):
                return False
            if not found.state.is_crashed() or found.state.message != message:
                await self.client.set_flow_run_state(run, Crashed(message=message), force=True)
        return True

    async def _crash_again(self, run: UUID, pod: str, message: str) -> None:
        """Repeat `_crash` for a while: the run's process ends some time after its pod was told to, and gives the signal as the reason."""
        until = time.time() + LAST_WORDS_S
        while time.time() < until and await self._crash(run, pod, message):
            await asyncio.sleep(RUN_LOOK_S)

    async def _recover(self) -> None:
        """Take care of what a previous worker has left behind: its pods, and runs that it had taken but not given a pod yet."""
        adopted = False
        while True:
            adopted = adopted or await self._adopt()
            await asyncio.sleep(RECOVER_S)
            with contextlib.suppress(Exception):  # the server does not answer; the next attempt may succeed
                await self._crash_forgotten()

    async def _crash_forgotten(self) -> None:
        """Mark pending runs as Crashed that no live worker of the pool can have taken; nothing else ever would."""
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

    async def _adopt(self) -> bool:
        """Take over pods that a previous worker rented for runs of this pool. Returns False if RunPod or the server does not answer."""
        try:
            await self._adopt_all()
        except (RefusedError, WrongKeyError, ValueError) as error:  # there is no pool-wide account: each run brings its own
            self._logger.debug("pods of an earlier worker are not taken over: %s", error)
        except Exception as error:
            self._logger.warning("looking for pods of an earlier worker failed, retrying in %.0f s: %s", RECOVER_S, error)
            return False
        return True

    async def _adopt_all(self) -> None:
        configuration = await RunPodConfiguration.from_template_and_values(self.work_pool.base_job_template, {}, client=self.client)
        context = await self._context(configuration)
        for pod in await anyio.to_thread.run_sync(context.account.client.pods):
            name = PodName.parse(pod.name)
            if name is None or name.owner != owner(context.volume.id) or name.run in self._mine:
                continue
            with contextlib.suppress(ObjectNotFound):
                run = await self.client.read_flow_run(name.run)
                if run.work_pool_name == self._work_pool_name and run.infrastructure_pid == pod.id and self._runs_task_group:
                    self._logger.info("goes on with the pod %s of the flow run %s", pod.id, run.name)
                    self._mine.add(run.id)
                    self._runs_task_group.start_soon(self._stay, run, configuration, context, pod, name)
        await self._crash_orphaned(context, configuration.poll_s)

    async def _crash_orphaned(self, context: "AccountContext", poll_s: float) -> None:
        """Mark runs as Crashed whose pod ended while neither worker nor server was running: they would fill the pool's limit forever."""
        on_a_pod = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=ON_A_POD)))
        pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[self._work_pool_name]))
        found = await self.client.read_flow_runs(flow_run_filter=on_a_pod, work_pool_filter=pool)
        # a run that was started again has the pod id of its first attempt until this worker has rented another pod
        orphans = [run for run in found if run.infrastructure_pid and run.id not in self._mine | self._submitting_flow_run_ids]
        for _ in range(GONE_LOOKS):  # pods are listed after the runs were read, because these runs had their pods by then
            alive = {pod.id for pod in await anyio.to_thread.run_sync(context.account.client.pods)}
            orphans = [run for run in orphans if run.infrastructure_pid not in alive]
            await asyncio.sleep(poll_s if orphans else 0)
        for run in orphans:
            state, _ = await self._run_of(run.id)
            if state in ON_A_POD:
                await self._propose_crashed_state(run, f"pod {run.infrastructure_pid}: it is gone, and nobody was there to see it end")

    async def _context(self, configuration: RunPodConfiguration) -> "AccountContext":
        """Return what all runs of this worker with the same account and volume share."""
        place = configuration.place
        if place.identity not in self._contexts:
            account = Account(place)
            volume = await anyio.to_thread.run_sync(account.volume)
            budget = Budget(account.store, cap_usd=configuration.budget_usd, reserve_usd=configuration.budget_reserve_usd)
            poller = Poller(account.client, configuration.poll_s, self._logger.warning)
            self._contexts.setdefault(place.identity, AccountContext(account, volume, budget, poller, Board(account.store, "LOCAL")))
        return self._contexts[place.identity]


@dataclass(frozen=True)
class AccountContext:
    """A RunPod account with one of its volumes, shared by the runs of a worker."""

    account: Account
    volume: Volume
    budget: Budget
    poller: Poller
    board: Board

    def post(self, text: str) -> None:
        """Post on the volume's board. Errors are ignored."""
        with contextlib.suppress(InfraError, OSError):
            self.board.post(text)
