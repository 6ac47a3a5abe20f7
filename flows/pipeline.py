"""The whole road, phase by phase. Each phase is a deployment of its own and runs on the work pool that suits it."""

import os
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow
from prefect.states import Cancelling

from tasks import artifacts
from tasks.config import PipelineConfig
from tasks.outside import record_sources
from tasks.phases import PHASES, PhaseManifest
from tasks.run_phase import phase_result

LINKED = {"precompute": "shards", "release": "release"}
"""Steps of phases whose newest folder has a name of its own on the volume: `shards`, `release`."""


def cancel_phases(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Cancel the phase runs of a pipeline run that was cancelled or crashed: nobody waits for them any more."""
    with get_client(sync_client=True) as client:
        for child in client.read_flow_runs(
            flow_run_filter=FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run.id]))
        ):
            if child.state and not child.state.is_final():
                client.set_flow_run_state(child.id, Cancelling(message="its pipeline run ended"))


@flow(name="pipeline", flow_run_name="{config.name} · pipeline", on_cancellation=[cancel_phases], on_crashed=[cancel_phases])
def pipeline(config: PipelineConfig, volume: str) -> None:
    """From videos to a released model: every phase that is not already done with these settings, in order.

    Args:
        config: What every phase does.
        volume: Folder that holds all results (an absolute path).
    """
    record_sources(config, Path(volume))
    done: dict[str, PhaseManifest] = {}
    for phase in PHASES:
        done[phase] = phase_result(phase, config, volume, done)
        if name := LINKED.get(phase):
            point(Path(volume) / name, done[phase].steps[name].folder)
    paths = "\n".join(f"* {row['what']}: `{row['path']}`" for row in done["release"].rows)
    artifacts.publish("pipeline", config.name, done["evaluate"].rows, f"The final model, in its modes.\n\n{paths}", [])


def point(link: Path, folder: str) -> None:
    """Make `link` a symbolic link to `folder`, which is relative to where the link is, in one step; something else of that name stays."""
    if link.exists() and not link.is_symlink():
        return
    new = link.with_name(f".{link.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(folder)
    new.replace(link)
