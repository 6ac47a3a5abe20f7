"""The pipeline through the real command: run, damage, change, retry from the UI, a phase by itself. Run again: in test_ui.py."""

import subprocess
from pathlib import Path

import pandas as pd
import pytest
from prefect.states import AwaitingRetry

from fvlm_core.eval.results import EvalReport
from fvlm_core.manifest import AnyManifest
from tests.e2e.volume import COMPLETED, FVLM, Result, Volume, newest_pipeline_run
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow(reason="a real server, workers and torchrun jobs"),
    pytest.mark.timeout(1800),
]

BEFORE_EVALUATION = ("precompute", "speed", "ablations", "scaling", "train")


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


def test_only_what_was_damaged_or_changed_is_made_again_also_when_the_run_is_retried_and_a_phase_runs_by_itself(volume: Volume) -> None:
    shard = next(iter(sorted(volume.step("precompute", "shards").glob("train/*.tar"))))
    checkpoint = next(path for path in sorted(volume.step("train", "stage1").rglob("checkpoints/*/*")) if path.is_file())
    shard.unlink()
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1] + b"\0\0")
    before = volume.made_at()
    volume.values["stages"]["stage3"]["run"]["steps"] += 1
    in_the_way = volume.phase_folder("evaluate") / "status.json"
    in_the_way.mkdir(parents=True)  # a folder where a file has to be
    failed = volume.run("--keep-server")
    assert failed.status == 1
    made = {"precompute": "Completed", "train": "Completed"}
    assert {phase: failed.states[phase] for phase in BEFORE_EVALUATION} == dict.fromkeys(BEFORE_EVALUATION, "Cached") | made
    assert failed.states["evaluate"] == "Failed"
    assert "Run the same command again" in failed.output
    assert shard.is_file()
    in_the_way.rmdir()
    with volume.client() as client:
        run = newest_pipeline_run(client)
        assert run.state_name == "Failed"
        client.set_flow_run_state(run.id, AwaitingRetry())
        wait_until(lambda: client.read_flow_run(run.id).state_name == "Completed", "the retried run", poll_s=0.5)
        after = volume.made_at()
        damaged, changed = {"shards", "stage1"}, {"stage3", "curves", "evaluation", "release"}
        assert {name for name in before if after[name] != before[name]} == damaged | changed

        videos = volume.path.parent / "own.csv"
        clips = sorted((volume.step("precompute", "clips") / "clips").glob("gaze_caption-*.mp4"))[:6]
        pd.DataFrame({"url": [*map(str, clips), "gone.mp4"], "caption": ["a clip"] * 7}).to_csv(videos, index=False)
        values = volume.config.model_dump(mode="json")
        own = {"name": "videos", "files": [str(videos)]}
        values["precompute"] |= {"sources": [own], "download": values["precompute"]["download"] | {"max_bad_share": 0.2}}
        deployment = client.read_deployment_by_name(f"precompute/{volume.config.name}")
        alone = client.create_flow_run_from_deployment(deployment.id, parameters={"config": values, "volume": str(volume.path)})
        wait_until(lambda: client.read_flow_run(alone.id).state_name == "Completed", "precompute by itself", poll_s=0.5)
    assert [schedule.active for schedule in deployment.schedules] == [False]
    (shards,) = [folder for folder in volume.path.glob("steps/shards-*") if "gone.mp4" in (folder / "manifest.json").read_text()]
    assert (volume.path / "shards").resolve() == shards.resolve(), "the newest"
    extra = AnyManifest.read(shards).model_extra or {}
    assert "gone.mp4" in [clip["url"] for clip in extra["bad"]]
    assert sum(source["samples"] for source in extra["sources"] if source["name"] == "videos") == 6
    stop = subprocess.run([FVLM, "stop", "--volume", volume.path], check=False)
    assert stop.returncode == 0
    assert not volume.processes()
