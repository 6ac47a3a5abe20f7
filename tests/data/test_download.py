"""Rendered clips through real HTTP and real video2dataset to shards and batches."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from fvlm_core.config import DataSettings, RunSettings
from fvlm_core.data import gaze
from fvlm_core.data.clips import make_clips
from fvlm_core.data.download import download
from fvlm_core.data.frames import encode_jpeg
from fvlm_core.data.jobs import ClipJob, ClipManifest, DownloadJob, DownloadManifest, ShardJob
from fvlm_core.data.loader import train_steps, val_batches
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.data.shards import make_shards
from fvlm_core.errors import UserError

PYTHON = Path(__file__).parents[2] / ".venv-video2dataset/bin/python"
needs_video2dataset = pytest.mark.skipif(not PYTHON.exists(), reason="needs ./infra/video2dataset_env.sh")
SOURCES = {
    "gaze_caption": {"task": "caption", "train": 6, "val": 2},
    "gaze_cell": {"task": "cell", "train": 6, "val": 2, "max_frames": 5},
    "gaze_image": {"task": "image", "train": 3, "val": 1, "min_frames": 1, "max_frames": 1},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    make_clips(ClipJob.model_validate({"output": folder, "sources": SOURCES}))
    return folder


def job(output, table, *, media=None, **changes):
    source = {"name": "videos", "files": [table], "media": media}
    return DownloadJob.model_validate(
        {
            "output": output,
            "source": source,
            "video2dataset_python": PYTHON,
            "frame_px": gaze.FRAME_PX,
            "timeout_s": 10,
            "retries": 0,
            **changes,
        }
    )


SPECIAL = {
    "list": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n" + b"".join(b"#EXTINF:9,\n/piece/%d.ts\n" % n for n in range(10)) + b"#EXT-X-ENDLIST\n",
    "piece": bytes(300_000),
    "dash": b'<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT10S"><Period duration="PT10S">'
    b'<AdaptationSet mimeType="video/mp4"><SegmentTemplate timescale="0" duration="2" media="$Number$.m4s" startNumber="1"/>'
    b'<Representation id="1" width="640" height="480" bandwidth="1000"/></AdaptationSet></Period></MPD>',
}
TYPES = {"list": "application/vnd.apple.mpegurl", "piece": "video/mp2t", "dash": "application/dash+xml", "drip": "video/mp4"}


class WebSite:
    """An HTTP server of clips, with pages of several kinds, and a gate that holds clips back.

    `/NAME` is a clip or 404; `/soft...` answers with a page; `/watch/NAME` is a page with the clip in it; `/closed/NAME` turns
    programs away; `/list/` is a playlist of ten pieces of 300 kB, `/dash/` a manifest that no program can read, `/drip/` never ends;
    `broken` names are 503, those in `flaky` as often as it says. What was asked for is in `asked`.
    """

    def __init__(self, folder: Path) -> None:
        self.gate, self.held = threading.Event(), ()
        self.broken: tuple[str, ...] = ()
        self.flaky: dict[str, int] = {}
        self.asked: list[str] = []
        self.gate.set()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.asked.append(self.path)
                kind, _, name = self.path.lstrip("/").partition("/")
                path = folder / self.path.split("?")[0].lstrip("/")
                if path.name in site.held:
                    site.gate.wait()
                found = path.is_file()
                content = path.read_bytes() if found else b"<html>no such page</html>"
                status = 200 if found or kind == "drip" or "soft" in self.path else 404
                if kind == "watch":
                    content, status = f'<html><video src="/clips/{name}.mp4"></video></html>'.encode(), 200
                elif kind == "closed":
                    status = 403
                elif kind in SPECIAL:
                    content, status = SPECIAL[kind], 200
                elif path.name in site.broken or site.flaky.get(path.name, 0) > 0:
                    site.flaky[path.name] = site.flaky.get(path.name, 0) - 1
                    content, status = b"try later", 503
                self.send_response(status)
                self.send_header("Content-Length", str(10**6 if kind == "drip" else len(content)))
                self.send_header("Content-Type", "video/mp4" if found and kind == "clips" else TYPES.get(kind, "text/html"))
                self.end_headers()
                with suppress(BrokenPipeError):
                    while kind == "drip":
                        self.wfile.write(b"0")
                        time.sleep(0.1)
                    self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def site(clips):
    site = WebSite(clips)
    yield site
    site.gate.set()
    site.server.shutdown()
    site.server.server_close()


def table_of(clips, path, *, site=None, broken=True):
    """The clips' table with every second one on the site; five rows that cannot work, for four reasons."""
    frame = pd.read_parquet(clips / "clips.parquet")
    if site:
        frame.loc[::2, "url"] = site.url + "/" + frame.loc[::2, "url"]
    if broken:
        (clips / "clips" / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(4000))
        whole = (clips / frame["url"][1]).read_bytes()
        (clips / "clips" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
        web = site.url if site else "http://127.0.0.1:1"
        urls = [
            "http://127.0.0.1:1/dead.mp4",
            f"{web}/missing.mp4",
            f"{web}/soft.mp4",
            "clips/noise.mp4",
            "clips/cut.mp4",
            "clips/gone.mp4",
        ]
        frame = pd.concat([frame, frame.iloc[:6].assign(url=urls)], ignore_index=True)
    frame.to_parquet(path)
    return path


def test_clips_are_the_same_every_time(clips, tmp_path):
    again = make_clips(ClipJob.model_validate({"output": tmp_path, "sources": SOURCES}))
    first = ClipManifest.read(clips)
    assert again.digest == first.digest
    assert first.sources == {"gaze_caption": 8, "gaze_cell": 8, "gaze_image": 4}


def test_natural_clips_need_a_caption(tmp_path):
    (tmp_path / "holiday.mp4").write_bytes(b"x")
    for name, message in (("holiday.mp4", "no caption is known"), ("bikes.mp4", "missing")):
        with pytest.raises(UserError, match=message):
            make_clips(ClipJob(output=tmp_path / "out", natural=[tmp_path / name]))


@needs_video2dataset
def test_from_clips_to_batches(clips, site, tmp_path):
    table = table_of(clips, tmp_path / "videos.parquet", site=site)
    manifest = download(job(tmp_path / "download", table, media=clips, max_bad_share=0.25, processes=2))
    assert manifest.counts["videos"] == 26
    assert manifest.counts["good"] == 20
    assert {clip.url.rsplit("/", 1)[1]: re.split(r"[:(]", clip.reason)[0] for clip in manifest.bad} == {
        "dead.mp4": "ConnectionError",
        "missing.mp4": "HTTP 404 Not Found",
        "soft.mp4": "a web page, not a video",
        "noise.mp4": "not a readable video",
        "cut.mp4": "not a readable video",
        "gone.mp4": "file not found",
    }
    with (tmp_path / "download" / "bad.csv").open() as stream:
        listed = list(csv.DictReader(stream))
    assert [(row["url"], row["reason"]) for row in listed] == [(clip.url, clip.reason) for clip in manifest.bad]
    assert [row["row"] for row in listed] == [str(number) for number in range(21, 27)]
    assert {row["file"] for row in listed} == {str(table)}

    made = make_shards(
        ShardJob.model_validate(
            {"output": tmp_path / "shards", "downloads": [tmp_path / "download"], "vocab_size": 320, "exercises": {"train": 8, "val": 4}}
        )
    )
    counted = {(source.name, source.split): (source.samples, source.frames) for source in made.sources}
    assert counted["gaze_caption", "train"] == (6, 18)
    assert counted["gaze_image", "val"] == (1, 1)
    assert counted["text", "val"] == (4, 0)
    assert made.bad == manifest.bad

    shards = ShardSet(tmp_path / "shards")
    shares = {"gaze_cell": 0.5, "gaze_caption": 0.2, "gaze_image": 0.1, "text": 0.2}
    data = DataSettings.model_validate({"mixture": [{"source": source, "share": share} for source, share in shares.items()]})
    run = RunSettings(steps=3, batch_samples=10)
    steps = list(train_steps(shards, data, run, tokens_per_frame=1, rank=0, world_size=1))
    assert [sum(batch.n_samples for batch in step) for step in steps] == [10, 10, 10]
    [batch] = val_batches(shards, 10, data, tokens_per_frame=1, batch_samples=10)
    assert batch.n_labels > 0

    rendered = {row["url"].rsplit("/", 1)[1]: row for row in pd.read_parquet(clips / "clips.parquet").to_dict("records")}
    for row in shards.rows("train", "gaze_cell").index:
        record, sample = shards.record(row), shards.read(row, image_repeats=8)
        original = rendered[record["origin"].rsplit("/", 1)[1]]
        assert record["caption"] == original["caption"]
        assert sample.frames.shape[0] == record["num_frames"] == record["duration_s"] == len(record["digits"])
        centres = sample.frames[:, 21 - 6 : 21 + 6, 21 - 6 : 21 + 6].max((1, 2, 3))
        assert (centres > 150).all()  # a digit is there, bright, in every frame


@needs_video2dataset
def test_killed_download_goes_on_where_it_was(clips, site, tmp_path):
    table = table_of(clips, tmp_path / "videos.parquet", broken=False)
    frame = pd.read_parquet(table)
    frame["url"] = site.url + "/" + frame["url"]
    frame.to_parquet(table)
    whole = download(job(tmp_path / "whole", table))
    settings = job(tmp_path / "killed", table)
    settings.to_yaml(tmp_path / "job.yaml")
    site.held = tuple(Path(url).name for url in frame["url"][12:])
    site.gate.clear()
    process = subprocess.Popen([sys.executable, "-m", "fvlm_core.data.download", str(tmp_path / "job.yaml")])
    raw = tmp_path / "killed" / "raw" / "0"
    _wait(lambda: len(list(raw.glob("*_stats.json"))) >= 2)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _wait(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children))
    assert not (tmp_path / "killed" / "manifest.json").exists()
    done = {path: path.stat().st_mtime_ns for stats in raw.glob("*_stats.json") for path in raw.glob(stats.name.split("_")[0] + "*")}
    (raw / "00003_stats.json").write_text('{"count": ')  # cut short by the kill
    site.gate.set()
    subprocess.run([sys.executable, "-m", "fvlm_core.data.download", str(tmp_path / "job.yaml")], check=True)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    resumed = DownloadManifest.read(tmp_path / "killed")
    assert resumed.digest == whole.digest
    assert resumed.counts["good"] == 20


@needs_video2dataset
def test_too_many_bad_videos_are_refused_by_reason_and_the_good_ones_kept(clips, site, tmp_path):
    """What was fetched is never fetched again: not after more may fail, and not when those that failed are tried once more."""
    table = table_of(clips, tmp_path / "videos.parquet", site=site)
    frame = pd.read_parquet(table)
    late = Path(frame["url"][0]).name
    site.broken = (late,)
    settings = job(tmp_path / "download", table, media=clips)
    with pytest.raises(UserError, match=r"7 of 26 videos failed; at most 10% may") as caught:
        download(settings)
    reasons = [
        r"2 x not a readable video, e\.g\. clips/noise\.mp4",
        "1 x HTTP 404 Not Found",
        r"1 x HTTP 503.*" + late,
        "1 x ConnectionError",
    ]
    for reason in reasons:
        assert re.search(reason, caught.value.what)
    assert "raise max_bad_share (in a profile precompute.download.max_bad_share)" in caught.value.fix
    assert len((tmp_path / "download" / "bad.csv").read_text().splitlines()) == 8
    assert not (tmp_path / "download" / "manifest.json").exists()

    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "download" / "raw").rglob("*.tar")}
    site.broken, site.asked = (), []
    with pytest.raises(UserError, match="6 of 26 videos failed"):
        download(settings)
    assert {Path(path).name for path in site.asked} == {late, "missing.mp4", "soft.mp4"}, "only what failed is tried again"
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    site.asked = []
    more = settings.model_copy(update={"max_bad_share": 0.3, "processes": 2, "threads": 4, "timeout_s": 9})
    assert more.hash() == settings.hash()
    manifest = download(more)
    assert not site.asked
    assert (manifest.counts["good"], manifest.counts["bad"]) == (20, 6)
    assert manifest.digest == download(job(tmp_path / "afresh", table, media=clips, max_bad_share=0.3)).digest


@needs_video2dataset
def test_what_fails_for_a_passing_reason_is_tried_again_after_all_others(clips, site, tmp_path):
    frame = pd.read_parquet(clips / "clips.parquet")
    late, gone = Path(frame["url"][0]).name, f"{site.url}/clips/gone.mp4"
    frame["url"] = site.url + "/" + frame["url"]
    pd.concat([frame, frame.iloc[:1].assign(url=gone)]).to_parquet(tmp_path / "videos.parquet")
    site.flaky = {late: 1}
    manifest = download(job(tmp_path / "download", tmp_path / "videos.parquet", retries=2))
    assert (manifest.counts["good"], manifest.counts["bad"]) == (len(frame), 1)
    assert [(clip.url, clip.reason.split(":")[0]) for clip in manifest.bad] == [(gone, "HTTP 404 Not Found")]
    asked = [Path(path).name for path in site.asked]
    assert (asked.count(late), asked[-1]) == (2, late), "once more, when the others are done"


@needs_video2dataset
def test_a_download_without_any_good_video(tmp_path):
    (tmp_path / "dead.csv").write_text("url,caption\nhttp://127.0.0.1:1/a.mp4,a\nnothing/b.mp4,b\n,c\nd.mp4,\n")
    with pytest.raises(UserError, match=r"none of the videos could be used:(.|\n)*file not found(.|\n)*no url(.|\n)*no caption") as caught:
        download(job(tmp_path / "dead", tmp_path / "dead.csv", max_bad_share=1))
    assert "a.mp4" in caught.value.what


@needs_video2dataset
def test_addresses_without_a_suffix_pages_and_large_files(clips, site, tmp_path):
    """A clip is a clip whatever its address; behind a page yt-dlp looks, and its reason is kept. None costs more than itself."""
    frame = pd.read_parquet(clips / "clips.parquet")
    names = [Path(url).stem for url in frame["url"]]
    (clips / "download").write_bytes((clips / frame["url"][0]).read_bytes())
    large = max((clips / "clips").glob("*.mp4"), key=lambda path: path.stat().st_size)
    (clips / "clips" / "large.mp4").write_bytes(large.read_bytes() + bytes(1_100_000))
    urls = {
        f"{site.url}/download?id=3": "",
        f"{site.url.replace('http', 'HTTP')}/watch/{names[1]}": "",
        f"{site.url}/soft/nothing": "a web page, not a video; yt-dlp: ",
        f"{site.url}/closed/nothing": "HTTP 403 Forbidden; yt-dlp: ",
        f"{site.url}/gone": "HTTP 404 Not Found",
        f"{site.url}/soft.mp4": "a web page, not a video",
        f"{site.url}/list/all": "a web page, not a video; yt-dlp: larger than 1 MB",
        f"{site.url}/dash/all": "ZeroDivisionError: ",
        f"{site.url}/drip/all": "too slow: ",
        f"{site.url}/clips/large.mp4": "larger than 1 MB (max_video_mb)",
        "clips/large.mp4": "larger than 1 MB (max_video_mb)",
    }
    pd.DataFrame({"url": list(urls), "caption": "a clip"}).to_csv(tmp_path / "videos.csv", index=False)
    manifest = download(job(tmp_path / "download", tmp_path / "videos.csv", media=clips, max_bad_share=0.9, max_video_mb=1, timeout_s=2))
    assert manifest.counts["good"] == 2
    assert {clip.url for clip in manifest.bad} == {url for url, reason in urls.items() if reason}
    for clip in manifest.bad:
        assert clip.reason.startswith(urls[clip.url])
        assert "FileNotFoundError" not in clip.reason
        if clip.reason.startswith(("a web page, not a video;", "HTTP 403")):
            assert len(clip.reason) > len(urls[clip.url]) + 10
    tried = {Path(path).name for path in site.asked}
    assert {"soft.mp4", "gone"} <= tried


SUBSAMPLE = """
import json, sys
from fvlm_core.data.video2dataset_plugin import ORIGIN, FrameSubsampler
streams, _, error = FrameSubsampler(frame_px=14, max_frames=2000)({"video": [sys.stdin.buffer.read()]}, [{ORIGIN: "a"}])
print(json.dumps([list(streams), error]))
"""


def subsampled(content):
    """Names of the frames in their order, and the error."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([PYTHON, "-c", SUBSAMPLE], input=content, env=environment, capture_output=True, check=True)
    return json.loads(done.stdout)


@needs_video2dataset
def test_more_than_a_thousand_frames_are_in_order_by_their_names():
    image = encode_jpeg(np.zeros((14, 14, 3), np.uint8))
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for number in range(1001):
            member = tarfile.TarInfo(f"{number:06d}")
            member.size = len(image)
            archive.addfile(member, io.BytesIO(image))
    names, error = subsampled(content.getvalue())
    assert error is None
    assert len(names) == 1001
    assert names == sorted(names)


@needs_video2dataset
def test_a_failure_of_whatever_kind_is_the_video_s_reason():
    names, error = subsampled(bytes(257) + b"ustar" + b"no tar" * 100)
    assert names == []
    assert error.startswith("ReadError: ")


def test_environment_is_checked_first(clips, tmp_path):
    table = table_of(clips, tmp_path / "videos.parquet", broken=False)
    with pytest.raises(UserError, match=r"environment is missing(.|\n)*video2dataset_env\.sh"):
        download(job(tmp_path / "out", table, video2dataset_python=tmp_path / "python"))
    with pytest.raises(UserError, match=r"environment does not work: ModuleNotFoundError(.|\n)*video2dataset_env\.sh"):
        download(job(tmp_path / "out", table, video2dataset_python=sys.executable))
    assert not (tmp_path / "out").exists()


def test_a_bad_table_ends_the_command_without_a_traceback(tmp_path):
    (tmp_path / "videos.csv").write_text("link,caption\na,b\n")
    job(tmp_path / "out", tmp_path / "videos.csv").to_yaml(tmp_path / "job.yaml")
    result = subprocess.run([sys.executable, "-m", "fvlm_core.data.download", str(tmp_path / "job.yaml")], capture_output=True, text=True)
    assert result.returncode == 2
    assert "lacks the column url" in result.stderr
    assert "Traceback" not in result.stderr


def _wait(condition, *, limit_s=60):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
