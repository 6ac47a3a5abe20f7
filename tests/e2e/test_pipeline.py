"""The pipeline through the real command: run, run again, change, damage, stop five ways, retry from the UI, a phase by itself."""

import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import AwaitingRetry, Cancelling

from fvlm_core.eval.results import EvalReport
from fvlm_core.manifest import AnyManifest
from fvlm_core.train.jobs import RunManifest
from tests.campaign.kill_campaign import campaign
from tests.e2e.conftest import LONG_STAGE2_STEPS, Uninterrupted
from tests.e2e.volume import CACHED, COMPLETED, FVLM, Command, Result, Volume, lengthen, of_job, progress, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow(reason="a real server, workers and torchrun jobs"), pytest.mark.timeout(1800)]

CACHED_RERUN_S = 60
STOP_AT_STEP = 30
"""Of stage 2: some checkpoints are there, and nearly all of it is still to come."""


def test_one_command_leads_from_videos_to_a_released_model(volume: Volume, finished: Result) -> None:
    assert finished.status == 0
    assert finished.ui.startswith("http://127.0.0.1:")
    assert finished.states == COMPLETED
    for word in ("coarse_only", "coarse_fine", "autoregressive", "question first", "question after"):
        assert word in finished.output
    paths = dict(line.split(maxsplit=1) for line in finished.output.splitlines() if line.startswith(("model ", "report ")))
    assert (Path(paths["model"]) / "model.safetensors").is_file()
    assert "<html" in Path(paths["report"]).read_text().lower()
    assert EvalReport.read(volume.step("evaluate", "evaluation")).headline.head[1:4] == ["coarse_only", "coarse_fine", "autoregressive"]
    assert not volume.processes(), "everything that was started has ended"


def test_a_second_run_is_cached(volume: Volume) -> None:
    again = volume.run()
    assert again.status == 0
    assert again.states == CACHED
    assert again.seconds < CACHED_RERUN_S


def test_damage_is_noticed_and_only_what_was_damaged_is_made_again(volume: Volume) -> None:
    shard = next(iter(sorted(volume.step("precompute", "shards").glob("train/*.tar"))))
    checkpoint = next(path for path in sorted(volume.step("train", "stage1").rglob("checkpoints/*/*")) if path.is_file())
    shard.unlink()
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1] + b"\0\0")
    before = volume.made_at()
    again = volume.run()
    assert again.status == 0
    assert again.states == CACHED | {"precompute": "Completed", "train": "Completed"}
    assert shard.is_file()
    after = volume.made_at()
    assert {name for name in before if after[name] != before[name]} == {"shards", "stage1"}


def test_a_changed_stage_and_what_follows_from_it_run_again_and_nothing_else(uninterrupted: Uninterrupted) -> None:
    assert uninterrupted.remade == {"stage2", "stage3", "curves", "evaluation", "release"}
    assert uninterrupted.manifest.steps == LONG_STAGE2_STEPS


def torchrun_is_killed(volume: Volume, command: Command, folder: Path) -> None:
    (torchrun,) = [process for process in of_job(folder) if process.cmdline()[1].endswith("/torchrun")]
    torchrun.kill()


def ctrl_c(volume: Volume, command: Command, folder: Path) -> None:
    command.process.send_signal(signal.SIGINT)
    assert command.result().status == 130
    assert not volume.processes()


def cancelled_in_the_ui(volume: Volume, command: Command, folder: Path) -> None:
    with volume.client() as client:
        client.set_flow_run_state(newest_pipeline_run(client).id, Cancelling())
    result = command.result()
    assert result.status == 1
    assert "The pipeline ended Cancelled" in result.output


def worker_is_killed(volume: Volume, command: Command, folder: Path) -> None:
    _part_is_killed(volume, command, "worker of fvlm-gpu", "worker", "fvlm-gpu")


def server_is_killed(volume: Volume, command: Command, folder: Path) -> None:
    _part_is_killed(volume, command, "Prefect server", "infra.server")


def _part_is_killed(volume: Volume, command: Command, name: str, *words: str) -> None:
    for part in volume.processes(*words):
        part.kill()
    result = command.result()
    assert result.status == 1
    assert f"the {name} ended" in result.output
    assert "Run the same command again" in result.output


@pytest.mark.parametrize("stop", [torchrun_is_killed, ctrl_c, cancelled_in_the_ui, worker_is_killed, server_is_killed])
def test_a_stage_stopped_in_the_middle_goes_on_from_its_checkpoint_to_the_same_weights(
    volume: Volume, uninterrupted: Uninterrupted, stop: Callable[[Volume, Command, Path], None]
) -> None:
    folder, alone = uninterrupted.folder, uninterrupted.manifest
    lengthen(volume.values, stage2=LONG_STAGE2_STEPS)
    shutil.rmtree(folder)
    command = volume.start()
    wait_until(lambda: progress(folder, since=0) >= STOP_AT_STEP, f"step {STOP_AT_STEP}")
    stop(volume, command, folder)
    if stop is torchrun_is_killed:  # the task is tried again by the same command
        last = command.result()
    else:
        assert not of_job(folder), "no job outlives its flow"
        last = volume.run()
    assert last.status == 0
    assert last.states == CACHED | {"train": "Completed"}, "equal weights: what follows from them is not made again"
    resumed = RunManifest.read(folder)
    (step,) = resumed.resumed_from
    assert 0 < step < LONG_STAGE2_STEPS
    assert resumed.losses == alone.losses
    assert resumed.digest == alone.digest, "the same weights, byte for byte"


def test_killed_again_and_again_at_random_it_ends_with_the_same_weights(
    volume: Volume, uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    lengthen(volume.values, stage2=LONG_STAGE2_STEPS)
    outcome = campaign(volume, tmp_path, kills=3, volumes=1, seed=1, time_limit_s=1200)
    assert outcome.kills == 3
    assert outcome.weights_equal
    assert outcome.order_equal


def test_a_failed_run_is_retried_from_the_ui_and_a_phase_runs_by_itself(volume: Volume) -> None:
    volume.values["evaluation"]["multiple_choice"]["questions"] += 1
    in_the_way = volume.phase_folder("evaluate") / "status.json"
    in_the_way.mkdir(parents=True)  # a folder where a file has to be
    failed = volume.run("--keep-server")
    assert failed.status == 1
    assert failed.states["evaluate"] == "Failed"
    assert "Run the same command again" in failed.output
    in_the_way.rmdir()
    with volume.client() as client:
        run = newest_pipeline_run(client)
        assert run.state_name == "Failed"
        client.set_flow_run_state(run.id, AwaitingRetry())
        wait_until(lambda: client.read_flow_run(run.id).state_name == "Completed", "the retried run")

        videos = volume.path.parent / "own.csv"
        clips = sorted((volume.step("precompute", "clips") / "clips").glob("gaze_caption-*.mp4"))[:6]
        pd.DataFrame({"url": [*map(str, clips), "gone.mp4"], "caption": ["a clip"] * 7}).to_csv(videos, index=False)
        values = volume.config.model_dump(mode="json")
        own = {"name": "videos", "files": [str(videos)]}
        values["precompute"] |= {"sources": [own], "download": values["precompute"]["download"] | {"max_bad_share": 0.2}}
        deployment = client.read_deployment_by_name(f"precompute/{volume.config.name}")
        alone = client.create_flow_run_from_deployment(deployment.id, parameters={"config": values, "volume": str(volume.path)})
        wait_until(lambda: client.read_flow_run(alone.id).state_name == "Completed", "precompute by itself")
    assert [schedule.active for schedule in deployment.schedules] == [False]
    (shards,) = [folder for folder in volume.path.glob("steps/shards-*") if "gone.mp4" in (folder / "manifest.json").read_text()]
    extra = AnyManifest.read(shards).model_extra or {}
    assert "gone.mp4" in [clip["url"] for clip in extra["bad"]]
    assert sum(source["samples"] for source in extra["sources"] if source["name"] == "videos") == 6
    stop = subprocess.run([FVLM, "stop", "--volume", volume.path], check=False)
    assert stop.returncode == 0
    assert not volume.processes()


def newest_pipeline_run(client: SyncPrefectClient) -> FlowRun:
    pipeline = FlowFilter(name=FlowFilterName(any_=["pipeline"]))
    (run,) = client.read_flow_runs(flow_filter=pipeline, sort=FlowRunSort.START_TIME_DESC, limit=1)
    return run
