"""The whole road through the real command: run, run again, change, damage, kill, interrupt, retry. In this order, on one volume."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import AwaitingRetry, Cancelling

from fvlm_core.eval.results import EvalReport
from fvlm_core.manifest import AnyManifest
from fvlm_core.progress import ProgressReport
from fvlm_core.train.jobs import RunManifest
from infra.launch import job_environment
from infra.processes import STACK_VARIABLE, marked
from tasks.phases import PHASES, phase_folder
from tests.e2e.conftest import Result, Road, ended, interrupt, of_job, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

CACHED_RERUN_S = 60
STAGE2_STEPS = 400
"""Long enough to be stopped in the middle, five times."""


def test_one_command_leads_from_videos_to_a_released_model(road: Road, finished: Result) -> None:
    assert finished.status == 0
    first, *_ = finished.output.splitlines()
    assert first.startswith("Prefect UI: http://127.0.0.1:")
    assert finished.states() == dict.fromkeys(PHASES, "Completed")
    for word in ("coarse_only", "coarse_fine", "autoregressive", "question first", "question after"):
        assert word in finished.output
    paths = dict(line.split(maxsplit=1) for line in finished.output.splitlines() if line.startswith(("model ", "report ")))
    assert (Path(paths["model"]) / "model.safetensors").is_file()
    assert "<html" in Path(paths["report"]).read_text().lower()
    assert EvalReport.read(road.step("evaluate", "evaluation")).headline.keys() == {"coarse_only", "coarse_fine", "autoregressive"}
    assert not list(marked(STACK_VARIABLE, road.mark)), "everything that was started has ended"


def test_a_second_run_is_cached(road: Road, finished: Result) -> None:
    again = road.run()
    assert again.status == 0
    assert again.states() == dict.fromkeys(PHASES, "Cached")
    assert again.seconds < CACHED_RERUN_S


def test_damage_is_noticed_and_only_what_was_damaged_is_made_again(road: Road, finished: Result) -> None:
    shard = next(iter(sorted(road.step("precompute", "shards").glob("train/*.tar"))))
    checkpoint = next(path for path in sorted(road.step("train", "stage1").rglob("checkpoints/*/*")) if path.is_file())
    shard.unlink()
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1] + b"\0\0")
    before = made_at(road)
    again = road.run()
    assert again.status == 0
    assert again.states() == dict.fromkeys(PHASES, "Cached") | {"precompute": "Completed", "train": "Completed"}
    assert shard.is_file()
    after = made_at(road)
    assert {name for name in before if after[name] != before[name]} == {"shards", "stage1"}


def test_stopped_in_the_middle_of_a_stage_it_goes_on_from_its_checkpoint(road: Road, finished: Result) -> None:
    """Only stage 2 and what follows runs after a change of stage 2; stopped five ways, it ends as if it had never been."""
    before = made_at(road)
    road.values["stages"]["stage2"]["run"] |= {"steps": STAGE2_STEPS, "eval_every": STAGE2_STEPS // 4}
    known = set(stage2_folders(road))
    process, started = road.start(), time.monotonic()
    wait_until(lambda: set(stage2_folders(road)) - known, "stage 2")
    (folder,) = set(stage2_folders(road)) - known
    stops = [STAGE2_STEPS * part // 6 for part in (1, 2, 3, 4, 5)]

    reach(folder, stops[0])
    (torchrun,) = [process for process in of_job(folder) if process.cmdline()[1].endswith("/torchrun")]
    torchrun.kill()

    reach(folder, stops[1])
    interrupt(process)
    result = ended(process, started)
    assert result.status == 130
    assert not list(marked(STACK_VARIABLE, road.mark))

    process, started = road.start(), time.monotonic()
    reach(folder, stops[2])
    with SyncPrefectClient(road.api, auth_string=road.password) as client:  # as the UI's button does
        client.set_flow_run_state(newest_pipeline_run(client).id, Cancelling())
    result = ended(process, started)
    assert result.status == 1
    assert "The pipeline ended Cancelled" in result.output
    assert not of_job(folder)

    for stop, (what, words) in zip(
        stops[3:], {"worker of fvlm-gpu": ("worker", "fvlm-gpu"), "Prefect server": ("infra.server",)}.items(), strict=True
    ):
        process, started = road.start(), time.monotonic()
        reach(folder, stop)
        for part in road.processes(*words):
            part.kill()
        result = ended(process, started)
        assert result.status == 1
        assert f"the {what} ended" in result.output
        assert "Run the same command again" in result.output
        assert not of_job(folder), "no job outlives its flow"

    last = road.run()
    assert last.status == 0
    assert last.states() == dict.fromkeys(PHASES, "Cached") | dict.fromkeys(("train", "evaluate", "release"), "Completed")
    after = made_at(road)
    assert {name for name in before if after[name] != before[name]} == {"stage2", "stage3", "evaluation", "release"}

    resumed = RunManifest.read(folder)
    assert len(resumed.resumed_from) == 5
    assert all(step > 0 for step in resumed.resumed_from)
    alone = uninterrupted(folder, road.volume.parent / "alone")
    assert resumed.losses == alone.losses
    assert resumed.digest == alone.digest, "the same weights, byte for byte"


def test_a_failed_run_is_retried_from_the_ui_and_a_phase_runs_by_itself(road: Road, finished: Result) -> None:
    road.values["evaluation"]["mcq_samples"] += 1
    in_the_way = phase_folder("evaluate", road.config, road.volume) / "status.json"
    in_the_way.mkdir(parents=True)  # a folder where a file has to be
    failed = road.run("--keep-server")
    assert failed.status == 1
    assert failed.states()["evaluate"] == "Failed"
    assert "Run the same command again" in failed.output
    in_the_way.rmdir()
    with SyncPrefectClient(road.api, auth_string=road.password) as client:
        run = newest_pipeline_run(client)
        assert run.state_name == "Failed"
        client.set_flow_run_state(run.id, AwaitingRetry())
        wait_until(lambda: client.read_flow_run(run.id).state_name == "Completed", "the retried run")

        videos = road.volume.parent / "own.csv"
        clips = sorted((road.step("precompute", "clips") / "clips").glob("gaze_caption-*.mp4"))[:6]
        pd.DataFrame({"url": [*map(str, clips), "gone.mp4"], "caption": ["a clip"] * 7}).to_csv(videos, index=False)
        values = road.config.model_dump(mode="json")
        values["precompute"] |= {"videos": str(videos), "download": values["precompute"]["download"] | {"max_bad_share": 0.2}}
        deployment = client.read_deployment_by_name("precompute/ci")
        alone = client.create_flow_run_from_deployment(deployment.id, parameters={"config": values, "volume": str(road.volume)})
        wait_until(lambda: client.read_flow_run(alone.id).state_name == "Completed", "precompute by itself")
    assert [schedule.active for schedule in deployment.schedules] == [False]
    (shards,) = [folder for folder in road.volume.glob("steps/shards-*") if "gone.mp4" in (folder / "manifest.json").read_text()]
    extra = AnyManifest.read(shards).model_extra or {}
    assert "gone.mp4" in [clip["url"] for clip in extra["bad"]]
    assert sum(source["samples"] for source in extra["sources"] if source["name"] == "videos") == 6
    stop = subprocess.run([Path(sys.executable).with_name("fvlm"), "stop", "--volume", road.volume], check=False)
    assert stop.returncode == 0
    assert not list(marked(STACK_VARIABLE, road.mark))


def made_at(road: Road) -> dict[str, str]:
    """When each step of the present configuration was made."""
    return {
        name: f"{made.folder} {AnyManifest.read(road.volume / made.folder).created_at}"
        for phase in PHASES
        for name, made in road.phase(phase).steps.items()
    }


def stage2_folders(road: Road) -> list[Path]:
    return [folder for folder in road.volume.glob("steps/stage2-*") if folder.is_dir()]


def reach(folder: Path, step: int) -> None:
    """Wait until the run in `folder` is past `step`, and has made steps since this was called."""
    now = time.time()

    def reached() -> bool:
        report = ProgressReport.read(folder)
        return report is not None and report.step >= step and (folder / "progress.json").stat().st_mtime > now

    wait_until(reached, f"step {step}")


def newest_pipeline_run(client: SyncPrefectClient) -> FlowRun:
    pipeline = FlowFilter(name=FlowFilterName(any_=["pipeline"]))
    (run,) = client.read_flow_runs(flow_filter=pipeline, sort=FlowRunSort.START_TIME_DESC, limit=1)
    return run


def uninterrupted(folder: Path, output: Path) -> RunManifest:
    """The same recipe, trained by torchrun alone."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"output": str(output)}
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    torchrun = Path(sys.executable).with_name("torchrun")
    subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node", "1", "-m", "fvlm_core.train", path],
        check=True,
        env=job_environment(os.environ, threads=1),
    )
    return RunManifest.read(output)
