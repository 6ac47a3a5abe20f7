"""One stage stopped five ways, one after the other: it goes on from its checkpoint each time, and ends with an undisturbed one's weights.

Each test stops it once more and leaves the rest to the next; any of them works without the others. It is stopped as a part of the
pipeline and as a phase that runs by itself.
"""

import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from prefect.states import Cancelling

from fvlm_core.train.jobs import METRICS_FILE, RunManifest
from tests.campaign.kill_campaign import order_of, processes_of
from tests.e2e.volume import CACHED, Command, Volume, newest_pipeline_run, of_job, progress
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow(reason="a real server, workers and torchrun jobs"),
    pytest.mark.timeout(1800),
]

STEPS_BETWEEN = 40
"""That the stage goes on before it is stopped again: some checkpoints."""


@dataclass
class Stopped:
    """A stage 2 that has to be made again, and the one that nothing stopped."""

    folder: Path
    alone: RunManifest
    order: str
    stops: int = 0


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Stopped:
    stage2 = Volume(folder).step("train", "stage2")
    stopped = Stopped(stage2, RunManifest.read(stage2), order_of(stage2 / METRICS_FILE))
    shutil.rmtree(stage2)
    return stopped


def going_on(volume: Volume, stopped: Stopped, phase: str | None = None) -> Command:
    """A command that trains the stage, when that has gone some way further than it had when it was stopped last."""
    reached = progress(stopped.folder)
    command = volume.start(phase=phase)
    wait_until(lambda: progress(stopped.folder) >= reached + STEPS_BETWEEN, "the stage to go on")
    stopped.stops += 1
    return command


def ctrl_c(volume: Volume, command: Command) -> None:
    command.process.send_signal(signal.SIGINT)
    assert command.result().status == 130
    assert not volume.processes()


def cancelled_in_the_ui(volume: Volume, command: Command) -> None:
    with volume.client() as client:
        client.set_flow_run_state(newest_pipeline_run(client).id, Cancelling())
    result = command.result()
    assert result.status == 1
    assert "The pipeline ended Cancelled" in result.output


def worker_is_killed(volume: Volume, command: Command) -> None:
    _part_is_killed(volume, command, "worker", "worker of fvlm-gpu")


def server_is_killed(volume: Volume, command: Command) -> None:
    _part_is_killed(volume, command, "server", "Prefect server")


def _part_is_killed(volume: Volume, command: Command, part: str, name: str) -> None:
    for process in processes_of(volume, part, command, []):
        process.kill()
    result = command.result()
    assert result.status == 1
    assert f"the {name} ended" in result.output
    assert "Run the same command again" in result.output


STOPS = ((ctrl_c, None), (cancelled_in_the_ui, None), (worker_is_killed, "train"), (server_is_killed, "train"))
"""With the phase that the command runs, or None for the pipeline."""


@pytest.mark.parametrize(("stop", "phase"), STOPS)
def test_a_stopped_command_ends_with_its_jobs_and_keeps_the_checkpoints(
    volume: Volume, stopped: Stopped, stop: Callable[[Volume, Command], None], phase: str | None
) -> None:
    command = going_on(volume, stopped, phase)
    stop(volume, command)
    assert not of_job(stopped.folder), "no job outlives its flow"
    assert any(stopped.folder.glob("checkpoints/*"))


def test_a_killed_job_is_tried_again_and_ends_with_the_weights_of_one_never_stopped(volume: Volume, stopped: Stopped) -> None:
    command = going_on(volume, stopped)
    (torchrun,) = processes_of(volume, "torchrun", command, of_job(stopped.folder))
    torchrun.kill()
    last = command.result()
    assert last.status == 0
    assert last.states == CACHED | {"train": "Completed"}, "equal weights: what follows from them is not made again"
    resumed = RunManifest.read(stopped.folder)
    assert len(resumed.resumed_from) == stopped.stops
    assert resumed.resumed_from[0] > 0
    assert resumed.resumed_from == sorted(set(resumed.resumed_from)), "each time further on"
    assert resumed.losses == stopped.alone.losses
    assert order_of(stopped.folder / METRICS_FILE) == stopped.order, "the same samples in the same order"
    assert resumed.digest == stopped.alone.digest, "the same weights, byte for byte"
