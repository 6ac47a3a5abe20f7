"""Registers the work pools and a deployment per phase on a Prefect server."""

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, FlowRunFilterTags
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow
from prefect.states import Crashed
from prefect.types.entrypoint import EntrypointType

from flows.pipeline import pipeline
from flows.registry import FLOWS, PHASES
from infra.processes import mark
from infra.stack import PROCESS_POOL, REPOSITORY
from tasks.config import PipelineConfig, Pool

ALL_FLOWS: dict[str, Flow[..., None]] = {"pipeline": pipeline, **FLOWS}
UNFINISHED = [StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED, StateType.CANCELLING, StateType.PAUSED]


def volume_tag(volume: Path) -> str:
    """On every deployment of the volume, and so on all of its runs."""
    return f"volume:{mark(volume)}"


async def register(config: PipelineConfig, volume: Path) -> dict[str, str]:
    """Make the work pools that are missing and all deployments of the profile; returns the type of each pool by name."""
    async with get_client() as client:
        # one after the other: SQLite lets one writer in at a time, and those who wait back off for seconds
        types = dict([await _pool(client, pool) for pool in config.machine.pools.by_role.values()])
        for name in ALL_FLOWS:
            await _deploy(client, name, config, volume, types)
    return types


async def crash_stale_runs(volume: Path) -> int:
    """Mark the volume's unfinished runs Crashed, when nothing is left that could go on with them. Returns how many there were.

    Runs that a schedule made ahead stay.
    """
    async with get_client() as client:
        runs = await client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                tags=FlowRunFilterTags(all_=[volume_tag(volume)]),
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=UNFINISHED)),
            )
        )
        stale = [run for run in runs if not run.auto_scheduled]
        message = "the server or worker it ran under was ended"
        await asyncio.gather(*(client.set_flow_run_state(run.id, Crashed(message=message), force=True) for run in stale))
        return len(stale)


async def _pool(client: PrefectClient, pool: Pool) -> tuple[str, str]:
    """Name and type of the pool; it is made where there is none of that name, and used as it is where there is."""
    try:
        return pool.name, (await client.read_work_pool(pool.name)).type
    except ObjectNotFound:
        new = WorkPoolCreate(name=pool.name, type=pool.type, description=pool.description, concurrency_limit=pool.limit)
        return pool.name, (await client.create_work_pool(new)).type


async def _deploy(client: PrefectClient, name: str, config: PipelineConfig, volume: Path, types: Mapping[str, str]) -> None:
    pool = config.machine.pools.by_role[PHASES[name].pool if name in PHASES else "cpu"]
    # A process pool would resolve a workspace for every run; flows are importable here, so that second is saved.
    local = {"command": f"{sys.executable} -m prefect.engine", "working_dir": str(REPOSITORY)} if types[pool.name] == PROCESS_POOL else {}
    deployment = await ALL_FLOWS[name].ato_deployment(
        config.name,
        parameters={"config": config.model_dump(mode="json"), "volume": str(volume)},
        description=ALL_FLOWS[name].description,
        tags=["fvlm", volume_tag(volume)],
        work_pool_name=pool.name,
        job_variables=local | pool.job_variables,
        entrypoint_type=EntrypointType.MODULE_PATH,
        schedules=await _schedules(client, name, config.name),
    )
    await deployment.aapply()


async def _schedules(client: PrefectClient, name: str, profile: str) -> list[DeploymentScheduleCreate]:
    """Those the deployment has, as users have set them; for a new one the phase's own, paused."""
    try:
        known = (await client.read_deployment_by_name(f"{ALL_FLOWS[name].name}/{profile}")).schedules
    except ObjectNotFound:
        cron = PHASES[name].schedule if name in PHASES else None
        return [DeploymentScheduleCreate(schedule=CronSchedule(cron=cron), active=False)] if cron else []
    kept = set(DeploymentScheduleCreate.model_fields)
    return [DeploymentScheduleCreate.model_validate(one.model_dump(include=kept)) for one in known]
