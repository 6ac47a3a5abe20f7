"""Registers the work pools and a deployment per phase on a Prefect server."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, FlowRunFilterTags
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow
from prefect.states import Crashed
from prefect.types.entrypoint import EntrypointType
from prefect.workers.base import BaseWorker

from flows.pipeline import pipeline
from flows.reap import EVERY_S, POOL, reap
from flows.registry import FLOWS, PHASES
from infra.processes import mark
from infra.stack import PROCESS_POOL, RENTED_POOL, queue_name, volume_tag
from infra.volume import known_volume_id, volume_id
from tasks.config import PipelineConfig
from tasks.machine import Pool

ALL_FLOWS: dict[str, Flow[..., None]] = {"pipeline": pipeline, **FLOWS}
UNFINISHED = [StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED, StateType.CANCELLING, StateType.PAUSED]
REGISTERED = ("description", "tags", "parameters", "entrypoint", "job_variables", "work_pool_name", "work_queue_name")
"""What of a deployment is ours; its schedules are the users'."""
LOCAL_JOB = {"command": "python -m prefect.engine", "working_dir": "."}
"""How a worker on local processes starts a flow run: with its own environment, in the folder where it was started itself. Flows are
importable there, so no workspace has to be resolved, which takes a second for every run."""


@dataclass(frozen=True)
class Registered:
    """What is on the server."""

    pool_types: dict[str, str]
    """Type of each work pool by name."""
    deployment: str
    """Name that the deployments of all flows have."""


def id_of(volume: Path) -> str:
    """The volume's id; where the volume is on other hosts only, a stand-in made of its path."""
    return volume_id(volume) if volume.is_dir() else known_volume_id(volume) or mark(volume)


async def register(config: PipelineConfig, volume: Path, *, code: str | None = None) -> Registered:
    """Make the work pools that are missing and all deployments of the profile; rented machines run the `code` on their volume."""
    known = id_of(volume)
    async with get_client() as client:
        # one after the other: SQLite lets one writer in at a time, and those who wait back off for seconds
        types = dict([await _pool(client, pool) for pool in config.machine.pools.by_role.values()])
        name = await _deployment_name(client, config.name, known)
        for flow in ALL_FLOWS:
            await _deploy(client, flow, name, config, volume, known, types, code)
        if config.machine.rental:
            types |= dict([await _pool(client, Pool(name=POOL, description="Looks after rented machines"))])
            await _deploy_reaper(name, config, volume, known)
    return Registered(types, name)


async def crash_stale_runs(volume: Path) -> int:
    """Mark the volume's unfinished runs Crashed, when nothing is left that could go on with them. Returns how many there were.

    Runs that a schedule made ahead stay.
    """
    async with get_client() as client:
        runs = await client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                tags=FlowRunFilterTags(all_=[volume_tag(id_of(volume))]),
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=UNFINISHED)),
            )
        )
        stale = [run for run in runs if not run.auto_scheduled]
        message = "the server or worker it ran under was ended"
        await asyncio.gather(*(client.set_flow_run_state(run.id, Crashed(message=message), force=True) for run in stale))
        return len(stale)


async def _deployment_name(client: PrefectClient, profile: str, volume: str) -> str:
    """The profile's name; with the volume's id where another volume of this server has deployments of that name."""
    try:
        known = await client.read_deployment_by_name(f"{ALL_FLOWS['pipeline'].name}/{profile}")
    except ObjectNotFound:
        return profile
    return profile if volume_tag(volume) in known.tags else f"{profile}-{volume[:6]}"


async def _pool(client: PrefectClient, pool: Pool) -> tuple[str, str]:
    """Name and type of the pool; it is made where there is none of that name, and used as it is where there is."""
    try:
        return pool.name, (await client.read_work_pool(pool.name)).type
    except ObjectNotFound:
        # the server has the template of its own types
        kind = None if pool.type == PROCESS_POOL else BaseWorker.get_worker_class_from_type(pool.type)
        new = WorkPoolCreate(
            name=pool.name,
            type=pool.type,
            description=pool.description,
            concurrency_limit=pool.limit,
            base_job_template=kind.get_default_base_job_template() if kind else {},
        )
        return pool.name, (await client.create_work_pool(new)).type


async def _deploy(
    client: PrefectClient,
    flow: str,
    name: str,
    config: PipelineConfig,
    volume: Path,
    known: str,
    types: Mapping[str, str],
    code: str | None,
) -> None:
    pool = config.machine.pools.by_role[PHASES[flow].pool if flow in PHASES else "pipeline"]
    kind, rental = types[pool.name], config.machine.rental
    given = LOCAL_JOB if kind == PROCESS_POOL else rental.job_variables(code) if kind == RENTED_POOL and rental else {}
    there = await _there(client, flow, name)
    wanted = await ALL_FLOWS[flow].ato_deployment(
        name,
        parameters={"config": config.model_dump(mode="json"), "volume": str(volume)},
        description=ALL_FLOWS[flow].description,
        tags=["fvlm", f"folder:{volume.name}", volume_tag(known)],
        work_pool_name=pool.name,
        work_queue_name=queue_name(known),
        job_variables=given | pool.job_variables,
        entrypoint_type=EntrypointType.MODULE_PATH,
        schedules=_schedules(flow, there),
    )
    if there is None or not _same(there, wanted):
        await wanted.aapply()


async def _deploy_reaper(name: str, config: PipelineConfig, volume: Path, known: str) -> None:
    deployment = await reap.ato_deployment(
        name,
        parameters={"config": config.model_dump(mode="json")},
        description=reap.description,
        tags=["fvlm", f"folder:{volume.name}", volume_tag(known)],
        work_pool_name=POOL,
        work_queue_name=queue_name(known),
        job_variables=LOCAL_JOB,
        entrypoint_type=EntrypointType.MODULE_PATH,
        interval=EVERY_S,
    )
    await deployment.aapply()


async def _there(client: PrefectClient, flow: str, name: str) -> DeploymentResponse | None:
    """The flow's deployment that the server has."""
    try:
        return await client.read_deployment_by_name(f"{ALL_FLOWS[flow].name}/{name}")
    except ObjectNotFound:
        return None


def _same(there: DeploymentResponse, wanted: RunnerDeployment) -> bool:
    """Whether it is already what would be registered: to write all of them anew costs the server seconds."""
    schema = wanted._parameter_openapi_schema.model_dump(exclude_unset=True)
    return there.parameter_openapi_schema == schema and all(getattr(there, name) == getattr(wanted, name) for name in REGISTERED)


def _schedules(flow: str, there: DeploymentResponse | None) -> list[DeploymentScheduleCreate]:
    """Those the deployment has, as users have set them; for a new one the phase's own, paused."""
    if there is None:
        cron = PHASES[flow].schedule if flow in PHASES else None
        return [DeploymentScheduleCreate(schedule=CronSchedule(cron=cron), active=False)] if cron else []
    kept = set(DeploymentScheduleCreate.model_fields)
    return [DeploymentScheduleCreate.model_validate(one.model_dump(include=kept)) for one in there.schedules]
