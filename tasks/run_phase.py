"""The pipeline's task: one phase, run by its own deployment on the work pool that suits it."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from prefect import get_run_logger, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment
from prefect.settings import PREFECT_UI_URL

from fvlm_core.errors import UserError
from fvlm_core.settings import hash_json
from tasks.config import PipelineConfig
from tasks.phase_run import result_storage
from tasks.phases import PhaseManifest, current, inputs_of, phase_folder, phase_key

POLL_S = 0.5
"""Between looks at the state of the phase's flow run."""


class PhaseFailedError(RuntimeError):
    """The phase's own flow run did not complete; the message is its own."""


@task(
    name="phase",
    persist_result=True,
    result_serializer="json",
    cache_key_fn=lambda _context, parameters: parameters["cache_key"],
)
def run_phase(phase: str, config: PipelineConfig, volume: str, cache_key: str) -> str:
    """Run the phase's deployment to its end; returns the digest of what it made. Cached by `cache_key`.

    Raises PhaseFailedError with the flow run's own message, UserError when the deployment is not registered.
    """
    name = f"{phase}/{deployment.name or config.name}"
    parameters = {"config": config.model_dump(mode="json"), "volume": volume}
    try:
        # not waited for there: it looks every five seconds at best
        child = cast(FlowRun, run_deployment(name, parameters=parameters, flow_run_name=f"{config.name} · {phase}", timeout=0))
    except ObjectNotFound as error:
        raise UserError(f"the deployment {name} is not registered", where="the Prefect server", fix="run `fvlm deploy`") from error
    get_run_logger().info("%s runs as %s", phase, run_url(child))
    with get_client(sync_client=True) as client:
        while child.state is None or not child.state.is_final():
            time.sleep(POLL_S)
            child = client.read_flow_run(child.id)
    if not child.state.is_completed():
        raise PhaseFailedError(f"{phase} ended {child.state.name}: {told(child.state)}\nIts run: {run_url(child)}")
    return PhaseManifest.read(phase_folder(phase, config, Path(volume))).digest


def phase_result(phase: str, config: PipelineConfig, volume: str, upstream: Mapping[str, PhaseManifest]) -> PhaseManifest:
    """The phase's manifest: cached while configuration, inputs and files are unchanged, else made by its deployment."""
    root = Path(volume)
    inputs = inputs_of(phase, config, root, upstream)
    cache_key = f"{phase}-{phase_key(phase, config)}-{hash_json(inputs)[:12]}"
    chosen = run_phase.with_options(
        task_run_name=phase,
        refresh_cache=current(phase, config, root, upstream=upstream) is None,
        result_storage=result_storage(root),
    )
    chosen(phase, config, volume, cache_key)
    return PhaseManifest.read(phase_folder(phase, config, root))


def told(state: State[Any]) -> str:
    """What a flow run's last state says, without Prefect's own words before it."""
    return (state.message or "it says nothing").removeprefix("Flow run encountered an exception: ").removeprefix("PhaseFailedError: ")


def run_url(run: FlowRun) -> str:
    """The run's page in the UI, or its name where no UI is known."""
    base = PREFECT_UI_URL.value()
    return f"{base}/runs/flow-run/{run.id}" if base else run.name
