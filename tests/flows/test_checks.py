"""What is refused before anything starts, and with which words."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from deployments import checks
from deployments.checks import check_programs, check_videos, check_volume, load_profile
from deployments.speedrun import speedrun
from fvlm_core.errors import UserError
from infra.processes import STACK_VARIABLE, marked
from infra.stack import Stack, StackError
from infra.volume import volume_id
from tasks.outside import table_digest

CI = load_profile("ci")


def table(folder: Path, columns: dict[str, list[str]], name: str = "clips.csv") -> Path:
    path = folder / name
    frame = pd.DataFrame(columns)
    frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("name", ["clips.csv", "clips.parquet"])
def test_a_good_table_passes(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    check_videos(table(tmp_path, {"url": ["a.mp4", str(tmp_path / "a.mp4")], "caption": ["one", "two"]}, name), 0.1)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"link": ["a.mp4"], "caption": ["x"]}, "lacks the column url"),
        ({"url": [], "caption": []}, "no rows"),
        ({"url": ["a.mp4", "b.mp4"], "caption": ["x", "y"]}, "2 of 2 videos are missing"),
        ({"url": ["http://127.0.0.1:9/a.mp4"], "caption": ["x"]}, "no video can be reached"),
        ({"url": [__file__, __file__], "caption": ["x", "y"]}, "only one video"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, columns: dict[str, list[str]], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        check_videos(table(tmp_path, columns), 0.1)
    assert "clips.csv" in caught.value.where


def test_a_missing_table_and_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        check_videos(tmp_path / "none.csv", 0.1)
    (tmp_path / "clips.txt").write_text("url,caption\n")
    with pytest.raises(UserError, match=r"\.txt"):
        check_videos(tmp_path / "clips.txt", 0.1)


def test_some_missing_files_are_for_the_download_to_count(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    urls = ["a.mp4"] * 9 + ["gone.mp4"]
    check_videos(table(tmp_path, {"url": urls, "caption": ["x"] * 10}), 0.1)


def test_the_digest_of_a_table_follows_its_local_files(tmp_path: Path) -> None:
    clip = tmp_path / "a.mp4"
    clip.write_bytes(b"x")
    path = table(tmp_path, {"url": ["a.mp4", "http://somewhere/b.mp4"], "caption": ["x", "y"]})
    before = table_digest(path)
    assert table_digest(path) == before
    clip.write_bytes(b"longer")
    assert table_digest(path) != before


def test_a_volume_that_cannot_be_written_or_is_nearly_full_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        check_volume(file / "volume", CI)
    huge = CI.with_changes({"machine.min_free_gb": 1e9})
    with pytest.raises(UserError, match="nearly full"):
        check_volume(tmp_path / "volume", huge)
    check_volume(tmp_path / "volume", CI)


def test_a_missing_environment_and_a_missing_ffmpeg_are_told_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = CI.with_changes({"machine.video2dataset_python": str(tmp_path / "python")})
    with pytest.raises(UserError, match="environment is missing") as caught:
        check_programs(absent)
    assert "video2dataset_env.sh" in caught.value.fix
    monkeypatch.setattr(checks, "CODECS", "import av_that_is_not_there")
    with pytest.raises(UserError, match="ffmpeg"):
        check_programs(CI)


def test_a_second_command_on_a_volume_leaves_the_first_alone(tmp_path: Path) -> None:
    first = Stack(tmp_path, environment={"PREFECT_API_URL": "http://elsewhere:4200/api"})
    first.start_server()
    environment = {**os.environ, STACK_VARIABLE: volume_id(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=environment) as worker:
        while not list(marked(STACK_VARIABLE, volume_id(tmp_path))):
            time.sleep(0.02)
        with pytest.raises(StackError, match="another fvlm command"):
            speedrun("ci", None, tmp_path, keep_server=False, port=None, console=Console())
        assert worker.poll() is None
        worker.kill()
    first.stop()
