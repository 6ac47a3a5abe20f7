"""The same shards, byte for byte, from one process, from two, and from a Spark cluster (a real one, on this machine)."""

import shutil
import subprocess
from pathlib import Path

import pytest

from fvlm_core.data.clips import make_clips
from fvlm_core.data.download import download
from fvlm_core.data.jobs import ClipJob, DownloadJob, ShardJob, ShardManifest
from fvlm_core.data.shards import make_shards

PYTHON = Path(__file__).parents[2] / ".venv-video2dataset/bin/python"


def missing() -> str:
    """Why there is no Spark here, or nothing."""
    if not PYTHON.exists():
        return "needs ./infra/video2dataset_env.sh"
    if shutil.which("java") is None:
        return "needs Java 17 or newer: ./infra/test_programs.sh"
    if subprocess.run([PYTHON, "-c", "import pyspark"], capture_output=True).returncode:
        return "needs pyspark, 490 MB: ./infra/video2dataset_env.sh --spark"
    return ""


@pytest.mark.slow(reason="three downloads, one of them on a Spark cluster that has to start")
def test_one_process_two_and_spark_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")  # it lives too short for more to pay
    if not PYTHON.exists():
        pytest.skip("needs ./infra/video2dataset_env.sh")
    sources = {"gaze_cell": {"task": "cell", "train": 8, "val": 2, "max_frames": 5}}
    make_clips(ClipJob.model_validate({"output": tmp_path / "clips", "sources": sources}))
    ways = {"one": {"processes": 1}, "two": {"processes": 2, "threads": 3}}
    reason = missing()
    if not reason:
        ways["spark"] = {"spark_master": "local[2]", "processes": 2}
    made: dict[str, ShardManifest] = {}
    for name, how in ways.items():
        source = {"name": "videos", "files": [tmp_path / "clips" / "clips.parquet"]}
        settings = {"output": tmp_path / name, "source": source, "video2dataset_python": PYTHON, "frame_px": 42}
        download(DownloadJob.model_validate(settings | how))
        job = {"output": tmp_path / name / "shards", "downloads": [tmp_path / name], "vocab_size": 300, "samples_per_shard": 3}
        made[name] = make_shards(ShardJob.model_validate(job))
    for name in ways:
        assert made[name].files == made["one"].files, name
        for file in made["one"].files:
            assert (tmp_path / name / "shards" / file.path).read_bytes() == (tmp_path / "one" / "shards" / file.path).read_bytes()
    if reason:
        pytest.skip(f"one and two processes agree; Spark {reason}")
