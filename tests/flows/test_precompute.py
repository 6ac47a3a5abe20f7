"""Sources of a profile through the real jobs: recorded, fetched by video2dataset, made into shards."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from deployments.checks import check_sources
from flows.precompute import PRECOMPUTE, SHARDS
from fvlm_core.data.clips import make_clips
from fvlm_core.data.jobs import ClipJob, DownloadManifest, ShardManifest
from fvlm_core.data.rows import SPLITS
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.data.sources import ADAPTERS
from fvlm_core.errors import UserError
from tasks.config import PipelineConfig
from tasks.direct import run_directly
from tasks.make import make
from tasks.mixtures import known_sources
from tasks.phase import EarlierResults
from tasks.steps import Step
from tests.tiny import PROFILE

TESTS = PipelineConfig.from_yaml(PROFILE)
needs_video2dataset = pytest.mark.skipif(not TESTS.machine.video2dataset_python.exists(), reason="needs ./infra/video2dataset_env.sh")
CLIPS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, and published files that name them: WebVid's, OpenVid's, SmolTalk's."""
    folder = tmp_path_factory.mktemp("published")
    gaze = {"gaze": {"task": "caption", "train": 2 * CLIPS, "val": 0, "min_frames": 1, "max_frames": 2}}
    make_clips(ClipJob.model_validate({"output": folder, "sources": gaze, "scale": 1}))
    clips = sorted((folder / "clips").glob("*.mp4"))
    webvid = [
        {"videoid": n, "name": f"web {n}", "contentUrl": str(path), "duration": "PT00H00M02S"} for n, path in enumerate(clips[:CLIPS])
    ]
    pd.DataFrame([*webvid, webvid[0] | {"duration": "PT01H00M00S"}]).to_csv(folder / "webvid.csv", index=False)
    openvid = [{"video": path.name, "caption": f"open {n}", "aesthetic score": 5.0 + n} for n, path in enumerate(clips[CLIPS:])]
    pd.DataFrame(openvid).to_csv(folder / "openvid.csv", index=False)
    chats = [[{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"{n}!"}] for n in range(20)]
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    return folder


def profile(folder: Path, *sources: dict[str, Any], **changes: Any) -> PipelineConfig:
    values = TESTS.model_dump(mode="json")
    values["precompute"] |= {"natural": False, "vision": None, "sources": list(sources)} | changes
    return PipelineConfig.from_values(values, where="test", folder=folder)


@needs_video2dataset
def test_every_format_runs_through_the_profile(folder: Path, tmp_path: Path) -> None:
    config = profile(
        folder,
        {"name": "web", "format": "webvid", "files": ["webvid.csv"], "filter": [{"column": "duration", "max": 64}]},
        {"name": "open", "format": "openvid", "files": ["openvid.csv"], "media": "clips", "limit": CLIPS - 1, "val_share": 0.4},
        {"name": "talk", "format": "smoltalk", "files": ["chats.jsonl"]},
        clips={"sources": {"gaze": {"task": "caption", "train": 2, "val": 2}}},
    )
    records = check_sources(config, tmp_path)
    assert known_sources(config, records) == {split: {"web", "open", "talk", "gaze", "text"} for split in SPLITS}
    made = run_directly([PRECOMPUTE], config, tmp_path)["precompute"].steps
    assert set(made) == {"clips", "download-web", "download-open", "download-clips", SHARDS}
    good = {name: DownloadManifest.read(tmp_path / made[name].folder).counts["good"] for name in ("download-web", "download-open")}
    assert good == {"download-web": CLIPS, "download-open": CLIPS - 1}
    assert PRECOMPUTE.outside(config, tmp_path) == {name: record.digest for name, record in records.items()}
    shards = ShardSet(tmp_path / made[SHARDS].folder)
    counted: dict[str, int] = {}
    for part in shards.manifest.sources:
        counted[part.name] = counted.get(part.name, 0) + part.samples
    exercises = config.precompute.shards.exercises
    assert exercises is not None
    assert counted == {"web": CLIPS, "open": CLIPS - 1, "talk": 20, "gaze": 4, "text": exercises.train + exercises.val}
    for name, adapter in (("web", "webvid"), ("open", "openvid")):
        turn = shards.record(int(shards.rows("train", name).index[0]))["conversations"][0][0]
        assert turn["question"] == ADAPTERS[adapter].prompt
        assert turn["answer"].startswith(name)
    assert ShardManifest.read(shards.folder).bad == []


@needs_video2dataset
def test_raising_max_bad_share_goes_on_in_the_same_folder(folder: Path, tmp_path: Path) -> None:
    clips = [str(path) for path in sorted((folder / "clips").glob("*.mp4"))[:4]]
    pd.DataFrame({"url": [*clips, "http://127.0.0.1:1/dead.mp4"], "caption": "a clip"}).to_csv(tmp_path / "some.csv", index=False)
    source = {"name": "web", "files": [str(tmp_path / "some.csv")]}

    def step(**download: Any) -> Step:
        config = profile(folder, source, download=download)
        PRECOMPUTE.prepare(config, tmp_path)
        return next(one for one in PRECOMPUTE.steps(config, EarlierResults(tmp_path, {}, {}, {})) if one.name == "download-web")

    with pytest.raises(UserError, match="1 of 5 videos failed; at most 10% may"):
        make(step(), tmp_path)
    raw = tmp_path / step().folder / "raw"
    kept = {path: path.stat().st_mtime_ns for path in raw.rglob("*.tar")}
    assert kept
    made = make(step(max_bad_share=0.2, processes=2, threads=4, timeout_s=30), tmp_path)
    assert made.folder == step().folder
    assert {path: path.stat().st_mtime_ns for path in raw.rglob("*.tar")} == kept
    assert DownloadManifest.read(tmp_path / made.folder).counts["good"] == 4


def test_keys_follow_the_source_and_nothing_of_where_it_is(folder: Path, tmp_path: Path) -> None:
    def step(volume: Path, **changes: Any) -> Step:
        config = profile(folder, {"name": "web", "format": "webvid", "files": ["webvid.csv"], **changes})
        steps = PRECOMPUTE.steps(config, EarlierResults(volume, {}, {}, {}))
        return next(one for one in steps if one.name == "download-web")

    first = step(tmp_path / "a")
    assert first.folder == step(tmp_path / "b").folder
    assert first.job_settings(tmp_path / "a")["record"].startswith(str(tmp_path / "a" / "sources" / "web-"))
    assert step(tmp_path / "a", limit=2).folder != first.folder
    assert step(tmp_path / "a", val_share=0.5).folder == first.folder, "splits are the shards' business"


def part_steps(config: PipelineConfig, volume: Path) -> dict[str, Step]:
    PRECOMPUTE.prepare(config, volume)
    return {one.name: one for one in PRECOMPUTE.steps(config, EarlierResults(volume, {}, {}, {})) if one.name.startswith("download-web")}


def test_parts_are_steps_of_their_own_and_stay_when_rows_are_added(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "some.csv"
    clips = sorted((folder / "clips").glob("*.mp4"))
    rows = pd.DataFrame({"url": [str(path) for path in clips], "caption": [f"clip {n}" for n in range(len(clips))]})

    def steps(rows: pd.DataFrame, **source: Any) -> dict[str, str]:
        rows.to_csv(table, index=False)
        config = profile(folder, {"name": "web", "files": [str(table)], **source}, download={"part_samples": 4})
        return {name: step.folder for name, step in part_steps(config, tmp_path).items()}

    first = steps(rows[:9])
    assert list(first) == [f"download-web-{number:05d}" for number in range(3)]
    grown = steps(rows)
    assert [grown[name] == first[name] for name in first] == [True, True, False]
    assert list(steps(rows, limit=8).items()) == list(first.items())[:2], "a limit only leaves parts out"
    changed = rows.assign(caption=[*rows["caption"][:5], "another", *rows["caption"][6:]])
    assert [folder == grown[name] for name, folder in steps(changed).items()] == [True, False, True]


RUN = """
import sys
from pathlib import Path
from flows.precompute import PRECOMPUTE
from tasks.config import PipelineConfig
from tasks.direct import run_directly
run_directly([PRECOMPUTE], PipelineConfig.from_yaml(Path(sys.argv[1])), Path(sys.argv[2]))
"""


@needs_video2dataset
def test_after_a_kill_only_the_unfinished_part_is_made_again(folder: Path, tmp_path: Path) -> None:
    clips = [str(path) for path in sorted((folder / "clips").glob("*.mp4"))[:6]]
    pd.DataFrame({"url": clips, "caption": [f"clip {n}" for n in range(6)]}).to_csv(tmp_path / "some.csv", index=False)
    one_at_a_time = {"machine": TESTS.machine.model_dump(mode="json") | {"parallel_jobs": 1}}
    source = {"name": "web", "files": [str(tmp_path / "some.csv")]}
    config = profile(folder, source, clips={"sources": {}}, download={"part_samples": 3})
    config = PipelineConfig.from_values(config.model_dump(mode="json") | one_at_a_time, where="test")
    config.to_yaml(tmp_path / "profile.yaml")
    volume = tmp_path / "volume"
    first, second = (volume / step.folder / "manifest.json" for step in part_steps(config, volume).values())
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path / "profile.yaml"), str(volume)])
    deadline = time.monotonic() + 100
    while not first.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not second.exists()
    made = first.stat().st_mtime_ns
    steps = run_directly([PRECOMPUTE], config, volume)["precompute"].steps
    assert first.stat().st_mtime_ns == made
    assert second.exists()
    shards = ShardSet(volume / steps[SHARDS].folder)
    assert sorted(shards.record(int(row))["caption"] for split in SPLITS for row in shards.rows(split, "web").index) == [
        f"clip {n}" for n in range(6)
    ]


def test_a_share_for_validation_goes_to_the_sources_that_its_rows_name(tmp_path: Path) -> None:
    rows = {"url": ["a.mp4", "b.mp4"], "caption": "a clip", "source": ["web", ""]}
    pd.DataFrame(rows).to_csv(tmp_path / "some.csv", index=False)
    config = profile(tmp_path, {"name": "mine", "files": ["some.csv"], "val_share": 0.25})
    steps = PRECOMPUTE.steps(config, EarlierResults(tmp_path, {}, {}, {}))
    assert next(one for one in steps if one.name == SHARDS).settings["val_shares"] == {"web": 0.25, "mine": 0.25}
