"""Runs the pipeline as a Prefect flow: one task per phase, which starts the phase's own deployment and waits for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from prefect import flow, get_run_logger, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow
from prefect.runtime import deployment
from prefect.settings import PREFECT_UI_URL
from prefect.states import Cancelling
from pydantic import JsonValue

from fvlm_core.errors import UserError, is_user_error
from fvlm_core.settings import hash_json
from fvlm_core.tables import Table
from infra.store import FolderStore
from tasks import artifacts
from tasks.bill import record_plan
from tasks.config import PipelineConfig
from tasks.dollars import in_dollars
from tasks.phase import Phase, PhaseManifest, Shown, current, link_steps
from tasks.phase_flow import changed, result_storage
from tasks.plan import plan
from tasks.rented import bill_table, budget_of
from tasks.waiting import LostRunError, wait_for_run

PURPOSE = "From videos to a released model: every phase that is not already done with these settings, in order."


class PhaseFailedError(RuntimeError):
    """The phase's own flow run did not complete. The message is that of the flow run."""


def pipeline_flow(phases: Sequence[Phase], module: str) -> Flow[..., None]:
    """Return the pipeline's flow. It must become the variable `pipeline` of `module`, where a worker looks for it."""

    @flow(
        name="pipeline",
        description=PURPOSE,
        flow_run_name="{config.name} · pipeline",
        on_cancellation=[cancel_phases],
        on_crashed=[cancel_phases],
    )
    def pipeline(changes: dict[str, JsonValue] | None = None, *, config: PipelineConfig, volume: str) -> None:
        """From videos to a released model: every phase that is not already done with these settings, in order.

        Args:
            changes: Settings to change in `config`, by dotted path: {"stages.stage2.run.steps": 10}.
            config: What every phase does.
            volume: Folder that holds all results (an absolute path).
        """
        run_pipeline(phases, changed(config, changes, volume), volume)

    pipeline.fn.__module__ = pipeline.__module__ = module
    pipeline.fn.__qualname__ = "pipeline"  # ty: ignore[missing-attribute] -- a function, as all that flows are made of
    return pipeline


def run_pipeline(phases: Sequence[Phase], config: PipelineConfig, volume: str) -> None:
    """Run every phase in order, then publish an artifact with what each of them found."""
    root, done = Path(volume), {}
    for phase in phases:
        phase.prepare(config, root)
    if config.machine.rental:
        record_plan(FolderStore(root), in_dollars(plan(phases, config, root), phases, config.machine.rental))
    for phase in phases:
        done[phase.name] = phase_result(phase, config, root, done)
        link_steps(phase, done[phase.name], root)
    outputs = {name: path for manifest in done.values() for name, path in manifest.shown.outputs.items()}
    table = Table.of([{"phase": name, "what it found": manifest.shown.text} for name, manifest in done.items()])
    artifacts.publish("pipeline", config.name, Shown(table=table, text="What every phase found.", outputs=outputs), root)
    if config.machine.rental:
        ledger = budget_of(config.machine.rental, FolderStore(root))
        artifacts.publish_bill(bill_table(FolderStore(root), ledger.position(), ledger.clock()))


def phase_result(phase: Phase, config: PipelineConfig, volume: Path, done: Mapping[str, PhaseManifest]) -> PhaseManifest:
    """Return the phase's manifest: cached while configuration, inputs and files are unchanged, otherwise made by its deployment."""
    cache_key = f"{phase.name}-{phase.key(config)}-{hash_json(phase.inputs(config, volume, done))[:12]}"
    found = current(phase, config, volume, done=done)
    for step, differences in (found.steps_of_other_code(volume) if found and config.machine.on_code_change == "warn" else {}).items():
        get_run_logger().warning("%s was made by other code: %s", step, "; ".join(differences))
    started_anew = run_phase.with_options(task_run_name=phase.name, refresh_cache=found is None, result_storage=result_storage(volume))
    started_anew(phase.name, config, str(volume), cache_key, done=found is not None)
    made = found or current(phase, config, volume, done=done)
    if made is None:
        # a retried flow run returns the results of its completed tasks unchecked: the phase runs as a new task
        started_anew(phase.name, config, str(volume), cache_key, done=False)
        made = current(phase, config, volume, done=done)
    if made is None:
        raise PhaseFailedError(f"{phase.name} ended, but its results are not complete: {phase.folder(config, volume)}")
    return made


@task(
    name="phase",
    persist_result=True,
    result_serializer="json",
    cache_key_fn=lambda _context, parameters: parameters["cache_key"],
)
def run_phase(phase: str, config: PipelineConfig, volume: str, cache_key: str, *, done: bool) -> str:
    """Run the phase's deployment to its end, and restart it if its machine is lost. Returns the name of its run. Cached by `cache_key`.

    A phase that is `done` but not in this cache (it ran by itself, or continued when its pipeline was lost) is only recorded and gets no
    machine.

    Raises PhaseFailedError with the flow run's own message, LostRunError if nothing is left that could finish the run, UserError if the
    deployment is not registered.
    """
    if done:
        get_run_logger().info("%s is done already", phase)
        return phase
    name = f"{phase}/{deployment.name or config.name}"
    parameters = {"config": config.model_dump(mode="json"), "volume": volume}
    for left in range(config.machine.crash_retries, -1, -1):
        try:
            # do not let it wait for the run: it polls only every five seconds
            child = cast(FlowRun, run_deployment(name, parameters=parameters, flow_run_name=f"{config.name} · {phase}", timeout=0))
        except ObjectNotFound as error:
            raise UserError(f"the deployment {name} is not registered", where="the Prefect server", fix="run `fvlm deploy`") from error
        get_run_logger().info("%s runs as %s", phase, run_url(child))
        try:
            with get_client(sync_client=True) as client:
                state = wait_for_run(client, child.id)
        except LostRunError as error:
            if not left:
                raise
            get_run_logger().warning("%s is started again: %s", phase, error)
            continue
        if state.is_completed():
            return child.name
        if not (state.is_crashed() and left) or is_user_error(message(state)):
            raise PhaseFailedError(f"{phase} ended {state.name}: {message(state)}\nIts run: {run_url(child)}")
        get_run_logger().warning("%s is started again, %d more times at most: %s", phase, left, message(state))
    raise AssertionError


def cancel_phases(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Cancel the phase runs of a pipeline run that was cancelled or crashed: nothing waits for them any more."""
    with get_client(sync_client=True) as client:
        for child in client.read_flow_runs(
            flow_run_filter=FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run.id]))
        ):
            if child.state and not child.state.is_final():
                client.set_flow_run_state(child.id, Cancelling(message="its pipeline run ended"))


def message(state: State[Any]) -> str:
    """Return the message of a flow run's last state, without Prefect's own prefixes."""
    return (state.message or "it says nothing").removeprefix("Flow run encountered an exception: ").removeprefix("PhaseFailedError: ")


def run_url(run: FlowRun) -> str:
    """Return the URL of the run's page in the UI, or the run's name if no UI is known."""
    base = PREFECT_UI_URL.value()
    return f"{base}/runs/flow-run/{run.id}" if base else run.name
