"""Register the work pools and one deployment per phase on a Prefect server."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow
from prefect.states import Crashed
from prefect.types.entrypoint import EntrypointType

from flows.reap import EVERY_S, POOL, reap
from flows.registry import PHASES, flow_of
from fvlm_core.errors import UserError
from infra.processes import mark
from infra.stack import PROCESS_POOL, RENTED_POOL, queue_name, volume_tag
from infra.volume import known_volume_id, volume_id
from tasks.config import PipelineConfig
from tasks.machine import Pool
from tasks.pipeline_flow import PURPOSE

PIPELINE = "pipeline"
FLOWS = (PIPELINE, *PHASES)
"""Names of all flows that have a deployment."""
UNFINISHED = [StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED, StateType.CANCELLING, StateType.PAUSED]
STALE = "the server or worker it ran under was ended"
"""Message of a run that no process can continue."""
LOCAL_JOB = {"command": "python -m infra.start prefect.engine", "working_dir": "."}
"""How a worker for local processes starts a flow run: with its own environment, in its own working directory. Flows can be imported
there, so Prefect need not resolve a workspace, which would take a second per run."""


@dataclass(frozen=True)
class Registered:
    """What was registered on the server."""

    pool_types: dict[str, str]
    """Type of each work pool by name."""
    deployment: str
    """Name of the deployments of all flows."""


def id_of(volume: Path) -> str:
    """The volume's id; if the volume exists only on other hosts, a substitute derived from its path."""
    return volume_id(volume) if volume.is_dir() else known_volume_id(volume) or mark(volume)


async def register(
    config: PipelineConfig, volume: Path, *, code: str | None = None, pool_types: Mapping[str, str] | None = None
) -> Registered:
    """Create missing work pools and all deployments of the profile. `code` names the upload on the volume that rented machines run.

    `pool_types` is the result of `make_pools`, if it was already called.
    """
    types = dict(pool_types) if pool_types is not None else await make_pools(config, volume)
    async with get_client() as client:
        known = id_of(volume)
        name, there = await _known(client, config.name, known)
        for flow in FLOWS:
            await _deploy(flow, name, config, volume, types, code, there.get(flow))
        if config.machine.rental:
            await _deploy_reaper(name, config, volume, known)
    return Registered(types, name)


async def make_pools(config: PipelineConfig, volume: Path) -> dict[str, str]:
    """Create missing work pools, and the volume's queue in each pool; returns the pools' types by name."""
    pools = [*config.machine.pools.by_role.values()]
    pools += [Pool(name=POOL, description="Looks after rented machines")] if config.machine.rental else []
    async with get_client() as client:
        # one after another: SQLite allows one writer at a time, and waiting writers back off for seconds
        return dict([await _pool(client, pool, queue_name(id_of(volume))) for pool in pools])


async def crash_stale_runs(volume: Path, message: str = STALE) -> int:
    """Mark the volume's unfinished runs Crashed; call this when no process is left to continue them. Returns their number.

    Runs that a schedule created in advance are kept.
    """
    async with get_client() as client:
        runs = await client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                tags=FlowRunFilterTags(all_=[volume_tag(id_of(volume))]),
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=UNFINISHED)),
            )
        )
        stale = [run for run in runs if not run.auto_scheduled]
        await asyncio.gather(*(client.set_flow_run_state(run.id, Crashed(message=message), force=True) for run in stale))
        return len(stale)


def flow_named(name: str) -> Flow[..., None]:
    """Return the flow of that name. Flows are created on demand, which takes a tenth of a second."""
    if name in PHASES:
        return flow_of(name)
    from flows.pipeline import pipeline

    return pipeline


async def _known(client: PrefectClient, profile: str, volume: str) -> tuple[str, dict[str, DeploymentResponse]]:
    """The name of the volume's deployments, and the existing deployments of that name by flow.

    The name is that of the profile, with the volume's id if another volume on this server already has deployments of that name.
    """
    other = f"{profile}-{volume[:6]}"
    flows = {one.id: one.name for one in await client.read_flows(flow_filter=FlowFilter(name=FlowFilterName(any_=[*FLOWS])))}
    found = await client.read_deployments(deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[profile, other])))
    there = {(one.name, flows.get(one.flow_id, "")): one for one in found}
    taken = there.get((profile, PIPELINE))
    name = profile if taken is None or volume_tag(volume) in taken.tags else other
    return name, {flow: there[name, flow] for flow in FLOWS if (name, flow) in there}


async def _pool(client: PrefectClient, pool: Pool, queue: str) -> tuple[str, str]:
    """Create the pool and its queue if they do not exist; returns the pool's name and type.

    An existing pool is used as it is, since others may use it too. Only its concurrency limit is updated, if the profile sets one.
    """
    try:
        there = await client.read_work_pool(pool.name)
        kind = there.type
        if pool.limit is not None and there.concurrency_limit != pool.limit:
            await client.update_work_pool(pool.name, WorkPoolUpdate(concurrency_limit=pool.limit))
    except ObjectNotFound:
        kind = await new_pool(client, pool)
    try:
        await client.read_work_queue_by_name(queue, work_pool_name=pool.name)
    except ObjectNotFound:
        await client.create_work_queue(queue, work_pool_name=pool.name)
    return pool.name, kind


async def new_pool(client: PrefectClient, pool: Pool) -> str:
    """Create the pool; returns its type. Raises UserError for a type that neither an installed library nor the server knows."""
    template = {} if pool.type == PROCESS_POOL else await _template(pool)  # the server has a template for this type
    new = WorkPoolCreate(
        name=pool.name,
        type=pool.type,
        description=pool.description,
        concurrency_limit=pool.limit,
        base_job_template=template,
    )
    return (await client.create_work_pool(new)).type


async def _template(pool: Pool) -> dict[str, Any]:
    """The base job template of the pool's type."""
    from prefect.workers.utilities import (  # imported here: most pools are of local processes
        get_available_work_pool_types,
        get_default_base_job_template_for_infrastructure_type,
    )

    template = await get_default_base_job_template_for_infrastructure_type(pool.type)
    if template is None:
        known = ", ".join(await get_available_work_pool_types())
        raise UserError(
            f"there is no work-pool type {pool.type!r}", where=f"machine.pools, the pool {pool.name}", fix=f"use one of {known}"
        )
    return template


async def _deploy(
    flow: str,
    name: str,
    config: PipelineConfig,
    volume: Path,
    types: Mapping[str, str],
    code: str | None,
    there: DeploymentResponse | None,
) -> None:
    """Write the flow's deployment, unless the existing one (`there`) is up to date: writing all deployments takes the server seconds."""
    pool = config.machine.pools.by_role[PHASES[flow].pool if flow in PHASES else PIPELINE]
    kind, rental, known = types[pool.name], config.machine.rental, id_of(volume)
    given = LOCAL_JOB if kind == PROCESS_POOL else rental.job_variables(code) if kind == RENTED_POOL and rental else {}
    wanted: dict[str, Any] = {
        "parameters": {"config": config.model_dump(mode="json"), "volume": str(volume)},
        "description": PHASES[flow].purpose if flow in PHASES else PURPOSE,
        "tags": ["fvlm", f"folder:{volume.name}", volume_tag(known)],
        "work_pool_name": pool.name,
        "work_queue_name": queue_name(known),
        "job_variables": given | pool.job_variables,
    }
    # the fields that this function manages; schedules belong to the users
    ours = wanted | {"entrypoint": f"flows.{flow}.{flow}", "parameter_openapi_schema": parameter_schema(flow)}
    if there is None or any(getattr(there, field) != value for field, value in ours.items()):
        entrypoint_type = EntrypointType.MODULE_PATH
        deployment = await flow_named(flow).ato_deployment(
            name, **wanted, entrypoint_type=entrypoint_type, schedules=_schedules(flow, there)
        )
        await deployment.aapply()


@cache
def parameter_schema(flow: str) -> dict[str, Any]:
    """OpenAPI schema of the pipeline's parameters, or of a phase's, which are the same for all phases."""
    return flow_named(flow if flow == PIPELINE else next(iter(PHASES))).parameters.model_dump(exclude_unset=True)


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


def _schedules(flow: str, there: DeploymentResponse | None) -> list[DeploymentScheduleCreate]:
    """The existing deployment's schedules, as users have set them; for a new deployment the phase's own, paused."""
    if there is None:
        cron = PHASES[flow].schedule if flow in PHASES else None
        return [DeploymentScheduleCreate(schedule=CronSchedule(cron=cron), active=False)] if cron else []
    kept = set(DeploymentScheduleCreate.model_fields)
    return [DeploymentScheduleCreate.model_validate(one.model_dump(include=kept)) for one in there.schedules]
