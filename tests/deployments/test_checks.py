"""What is refused before anything starts, and with which words."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pandas as pd
import pytest
from rich.console import Console

from deployments import checks
from deployments.checks import check_programs, check_sources, check_volume
from deployments.pretrained import check_pretrained
from deployments.speedrun import speedrun
from fvlm_core.data.rows import SPLITS
from fvlm_core.data.sources.record import Record
from fvlm_core.errors import UserError
from infra.processes import STACK_VARIABLE, marked
from infra.stack import Stack, StackError
from infra.volume import volume_id
from tasks.config import PipelineConfig
from tasks.mixtures import known_sources
from tests.tiny import PROFILE

TESTS = PipelineConfig.from_yaml(PROFILE)


def table(folder: Path, columns: dict[str, list[str]], name: str = "clips.csv") -> Path:
    path = folder / name
    frame = pd.DataFrame(columns)
    frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, index=False)
    return path


def check(volume: Path, *files: Path, max_bad_share: float = 0.1, **settings: Any) -> dict[str, Record]:
    """Check the profile ci with one source more."""
    values = TESTS.model_dump(mode="json")
    values["precompute"]["sources"] = [{"name": "videos", "files": [str(file) for file in files], **settings}]
    values["precompute"]["download"]["max_bad_share"] = max_bad_share
    return check_sources(PipelineConfig.from_values(values, where="test"), volume)


@pytest.mark.parametrize("name", ["clips.csv", "clips.parquet"])
def test_a_good_table_passes(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    path = table(tmp_path, {"url": ["a.mp4", str(tmp_path / "a.mp4")], "caption": ["one", "two"], "source": ["", "mine"]}, name)
    records = check(tmp_path, path)
    assert known_sources(TESTS, records) == dict.fromkeys(SPLITS, TESTS.precompute.made_names | {"videos", "mine"})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"link": ["a.mp4"], "caption": ["x"]}, "lacks the column url"),
        ({"url": [], "caption": []}, "no rows"),
        ({"url": ["a.mp4", "b.mp4"], "caption": ["x", "y"]}, "2 of 2 videos are missing"),
        ({"url": ["http://127.0.0.1:9/a.mp4"], "caption": ["x"]}, "no video can be reached"),
        ({"url": ["HTTP://127.0.0.1:9/a.mp4"], "caption": ["x"]}, "no video can be reached"),
        ({"url": ["a.mp4", "gs://bucket/b.mp4"], "caption": ["x", "y"]}, r"gs:// cannot be fetched: .*\(row 2\)"),
        ({"url": [__file__, __file__], "caption": ["x", "y"]}, "only one video"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, columns: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check(tmp_path, table(tmp_path, columns))
    assert "clips.csv" in caught.value.where


def test_a_missing_table_and_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        check(tmp_path, tmp_path / "none.csv")
    (tmp_path / "clips.txt").write_text("url,caption\n")
    with pytest.raises(UserError, match=r"\.txt"):
        check(tmp_path, tmp_path / "clips.txt")
    with pytest.raises(UserError, match="lacks the column messages"):
        check(tmp_path, table(tmp_path, {"url": ["a.mp4"], "caption": ["x"]}, "chats.parquet"), format="smoltalk")


def test_some_missing_files_are_for_the_download_to_count(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    urls = ["a.mp4"] * 9 + ["gone.mp4"]
    path = table(tmp_path, {"url": urls, "caption": ["x"] * 10})
    check(tmp_path, path)
    with pytest.raises(UserError, match="1 of 10 videos are missing"):
        check(tmp_path, path, max_bad_share=0.05)


def test_a_volume_that_cannot_be_written_or_is_nearly_full_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        check_volume(file / "volume", TESTS)
    huge = TESTS.with_changes({"machine.min_free_gb": 1e9})
    with pytest.raises(UserError, match="nearly full"):
        check_volume(tmp_path / "volume", huge)
    check_volume(tmp_path / "volume", TESTS)


def test_a_missing_environment_and_a_missing_ffmpeg_are_reported_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = TESTS.with_changes({"machine.video2dataset_python": str(tmp_path / "python")})
    with pytest.raises(UserError, match="environment is missing") as caught:
        check_programs(absent)
    assert "video2dataset_env.sh" in caught.value.fix
    monkeypatch.setattr(checks, "CODECS", "import av_that_is_not_there")
    with pytest.raises(UserError, match="ffmpeg"):
        check_programs(TESTS)


def test_a_second_command_on_a_volume_leaves_the_first_alone(tmp_path: Path) -> None:
    first = Stack(tmp_path, environment={"PREFECT_API_URL": "http://elsewhere:4200/api"})
    first.start_server()
    environment = {**os.environ, STACK_VARIABLE: volume_id(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=environment) as worker:
        while not list(marked(STACK_VARIABLE, volume_id(tmp_path))):
            time.sleep(0.02)
        with pytest.raises(StackError, match="another fvlm command"):
            speedrun(str(PROFILE), None, tmp_path, keep_server=False, port=None, console=Console())
        assert worker.poll() is None
        worker.kill()
    first.stop()


@pytest.fixture
def dead_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An unreachable hub; returns the folder of an empty local cache."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def with_backbones(vision: str, tokenizer: str | None = None, frame_px: int = 42) -> PipelineConfig:
    values = TESTS.model_dump(mode="json")
    values["model"]["vision"] = {"checkpoint": vision, "shape": None, "frame_px": frame_px}
    values["precompute"]["vision"] = None
    if tokenizer:
        values["precompute"]["shards"] |= {"tokenizer": tokenizer, "vocab_size": None}
    return PipelineConfig.from_values(values, where="test")


def checkpoint(folder: Path, *names: str, patch: int = 14) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(json.dumps({"patch_size": patch}))
    return str(folder)


COMPLETE = ("config.json", "model.safetensors")


def test_backbones_and_tokenizers_are_looked_for_first(tmp_path: Path, dead_hub: Path) -> None:
    check_pretrained(TESTS)
    good = checkpoint(tmp_path / "dinov2", *COMPLETE)
    check_pretrained(with_backbones(good))
    with pytest.raises(UserError, match=r"lacks model\.safetensors or"):
        check_pretrained(with_backbones(checkpoint(tmp_path / "half", "config.json")))
    with pytest.raises(UserError, match="there is no folder") as caught:
        check_pretrained(with_backbones(str(tmp_path / "gone")))
    assert caught.value.where == "model.vision.checkpoint"
    with pytest.raises(UserError, match="neither a folder nor a name on the hub"):
        check_pretrained(with_backbones("./gone with spaces"))
    started = time.monotonic()
    with pytest.raises(UserError, match="is not in the local cache, and the hub cannot be reached"):
        check_pretrained(with_backbones("someone/dinov2"))
    with pytest.raises(UserError, match=r"tokenizer_config\.json") as caught:
        check_pretrained(with_backbones(good, tokenizer=good))
    assert caught.value.where == "precompute.shards.tokenizer"
    assert time.monotonic() - started < 15


def test_a_cached_backbone_needs_no_hub(tmp_path: Path, dead_hub: Path) -> None:
    repository = dead_hub / "models--someone--dinov2"
    checkpoint(repository / "snapshots" / "abc", *COMPLETE)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    check_pretrained(with_backbones("someone/dinov2"))
    with pytest.raises(UserError, match="frames of 48 px are not a multiple of someone/dinov2's patch of 14 px"):
        check_pretrained(with_backbones("someone/dinov2", frame_px=48))


def test_frames_are_a_multiple_of_the_patch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="frames of 42 px are not a multiple") as caught:
        check_pretrained(with_backbones(checkpoint(tmp_path / "dinov2", *COMPLETE, patch=16)))
    assert "48" in caught.value.fix
    with pytest.raises(UserError, match=r"frame_px 43 is not a multiple of shape\.patch_px 14"):
        TESTS.with_changes({"model.vision.frame_px": 43})
