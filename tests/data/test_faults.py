"""Everything that may be wrong with a clip, a shard or a disk: nothing is lost, nothing is there twice, each loss has its reason."""

import csv
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import pytest

from fvlm_core.data.clips import encode_mp4
from fvlm_core.data.download import download
from fvlm_core.data.jobs import INDEX_FILE, LEFT_OUT_FILE, DownloadJob, ShardJob, ShardManifest
from fvlm_core.data.rows import SPLITS
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.data.shards import make_shards
from fvlm_core.data.verify import verify
from fvlm_core.errors import UserError
from tests.data.test_download import PYTHON, WebSite, needs_video2dataset
from tests.tiny import tiny_shards

HOURS_3 = 3 * 3600


def noise(seconds: int, size: int = 64) -> bytes:
    return encode_mp4(np.random.default_rng(seconds).integers(0, 255, (seconds, size, size, 3), dtype=np.uint8))


def film(pts_s: list[float], size: tuple[int, int], *, preset: str = "ultrafast") -> bytes:
    """An H.264 video of pictures shown from these times on."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10, options={"preset": preset, "crf": "30"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, start_s in enumerate(pts_s):
            picture = av.VideoFrame.from_ndarray(np.full((*size, 3), 40 + number % 8 * 20, np.uint8), format="rgb24")
            picture.pts, picture.time_base = round(start_s * 1000), Fraction(1, 1000)
            output.mux(stream.encode(picture))
        output.mux(stream.encode())
    return buffer.getvalue()


def without_frames() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        output.start_encoding()
    return buffer.getvalue()


def sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        output.mux(stream.encode(silence))
        output.mux(stream.encode())
    return buffer.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "html-as.mp4": lambda: b"<!DOCTYPE html><html><body>please log in</body></html>",
    "truncated.mp4": lambda: noise(6)[: len(noise(6)) // 2],
    "zero-frames.mp4": without_frames,
    "audio-only.mp4": sound,
    "short.mp4": lambda: film([0, 0.1, 0.2], (64, 64)),
    "hours.mp4": lambda: film([float(second) for second in range(0, HOURS_3, 60)], (32, 32)),
    "pixels.mp4": lambda: film([number / 10 for number in range(20)], (8, 8)),
    "eight-k.mp4": lambda: film([0, 0.5], (4320, 7680)),
    "plain.mp4": lambda: noise(3),
}
FRAMES = {"short.mp4": 1, "hours.mp4": 64, "pixels.mp4": 2, "eight-k.mp4": 1, "plain.mp4": 3}
"""Of what can be used."""
REASONS = {
    "dead.mp4": r"ConnectionError",
    "missing.mp4": r"HTTP 404 Not Found",
    "html-as.mp4": r"a web page, not a video",
    "truncated.mp4": r"not a readable video|breaks off|damaged",
    "zero-frames.mp4": r"no video stream",
    "audio-only.mp4": r"no video stream",
}


def shards_of_every_case(folder: Path, copies: int = 1) -> ShardManifest:
    """Make `folder`/shards of a table that has every case `copies` times; half the files come from a web server.

    Of the addresses, that of copy 2 of a case ends in `2-NAME`.
    """
    names = [f"{number}-{name}" for name in FILES for number in range(copies)]
    for name, make in FILES.items():
        content = make()
        for number in range(copies):
            (folder / f"{number}-{name}").write_bytes(content)
    site = WebSite(folder)
    urls = [f"{site.url}/{name}" if place % 2 else name for place, name in enumerate(names)]
    urls += [f"http://127.0.0.1:1/{number}-dead.mp4" for number in range(copies)]
    urls += [f"{site.url}/{number}-missing.mp4" for number in range(copies)]
    pd.DataFrame({"url": urls, "caption": [f"case {place}" for place in range(len(urls))]}).to_csv(folder / "cases.csv", index=False)
    source = {"name": "cases", "files": [folder / "cases.csv"]}
    settings = {"output": folder / "download", "source": source, "video2dataset_python": PYTHON, "frame_px": 42, "max_bad_share": 0.9}
    download(DownloadJob.model_validate(settings))
    site.server.shutdown()
    site.server.server_close()
    return make_shards(ShardJob(output=folder / "shards", downloads=[folder / "download"], vocab_size=300))


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ShardManifest]:
    """Folder and manifest of shards that have every case once."""
    folder = tmp_path_factory.mktemp("faults")
    manifest = shards_of_every_case(folder)
    return folder / "shards", manifest


@needs_video2dataset
@pytest.mark.parametrize("name", [*FILES, *sorted(set(REASONS) - set(FILES))])
def test_a_clip_is_a_sample_or_left_out_with_its_reason(faulty: tuple[Path, ShardManifest], name: str) -> None:
    folder, manifest = faulty
    shards = ShardSet(folder)
    records = [shards.record(int(row)) for split in SPLITS for row in shards.rows(split).index]
    found = [record["num_frames"] for record in records if record["origin"].endswith(name)]
    reasons = [clip.reason for clip in manifest.bad if clip.url.endswith(name)]
    assert found == ([FRAMES[name]] if name in FRAMES else [])
    assert len(reasons) == (name in REASONS)
    if name in REASONS:
        assert re.search(REASONS[name], reasons[0])


@needs_video2dataset
def test_every_row_is_counted_once(faulty: tuple[Path, ShardManifest]) -> None:
    folder, manifest = faulty
    assert manifest.counts["samples"] == len(FRAMES)
    assert sum(loss.samples for loss in manifest.lost) == len(REASONS)
    assert {loss.source for loss in manifest.lost} == {"cases"}
    with (folder / LEFT_OUT_FILE).open() as stream:
        assert [row["reason"] for row in csv.DictReader(stream)] == [clip.reason for clip in manifest.bad]
    assert sum(source.frames for source in manifest.sources) == sum(FRAMES.values())
    assert sum(source.bytes for source in manifest.sources) == sum(file.bytes for file in manifest.files if file.path.endswith(".tar"))
    assert sum(source.hours for source in manifest.sources) == pytest.approx((HOURS_3 + 6) / 3600, rel=0.01)
    assert verify(folder).problems == []


def corrupt_jpeg(tar: Path, row: Any) -> None:
    with tar.open("r+b") as stream:
        stream.seek(int(row["frame_offsets"][0]) + 2)
        stream.write(bytes(64))


def truncate(tar: Path, _row: Any) -> None:
    os.truncate(tar, tar.stat().st_size // 2)


def change_text(tar: Path, row: Any) -> None:
    content = bytearray(tar.read_bytes())
    place = content.index(b'"caption":"', int(row["json_offset"])) + 12
    content[place] ^= 1
    tar.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(corrupt_jpeg, r"a frame is damaged|sha256 differs"), (truncate, r"ends within|bytes, expected"), (change_text, r"sha256 differs")],
)
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Callable[[Path, Any], None], reason: str) -> None:
    folder = tiny_shards(tmp_path, clips=3)
    row = pd.read_parquet(folder / INDEX_FILE).query("source == 'gaze_cell' and split == 'train'").iloc[0]
    damage(folder / row["shard"], row)
    problems = verify(folder).problems
    assert problems
    assert all(row["shard"] in problem for problem in problems)
    assert any(re.search(reason, problem) for problem in problems)


def test_a_missing_index_is_an_error(tmp_path: Path) -> None:
    folder = tiny_shards(tmp_path, clips=1)
    (folder / INDEX_FILE).unlink()
    with pytest.raises(UserError, match="index cannot be read"):
        ShardSet(folder)
    assert ShardManifest.read(folder).problems(folder) == [f"{INDEX_FILE}: missing"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 600 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted as root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@needs_video2dataset
@pytest.mark.slow(reason="starts the job twice, in a process of its own")
def test_a_full_disk_is_said_and_what_is_done_is_kept(faulty: tuple[Path, ShardManifest], small_disk: Path, tmp_path: Path) -> None:
    folder, manifest = faulty
    job = ShardJob(output=small_disk / "shards", downloads=[folder.parent / "download"], vocab_size=300)
    job.to_yaml(tmp_path / "job.yaml")
    command = [sys.executable, "-m", "fvlm_core.data.shards", str(tmp_path / "job.yaml")]
    (small_disk / "other").write_bytes(bytes(400_000))
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert "the disk is full" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (small_disk / "shards" / "manifest.json").exists()
    (small_disk / "other").unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    subprocess.run(command, check=True)
    assert ShardManifest.read(small_disk / "shards").digest == manifest.digest
