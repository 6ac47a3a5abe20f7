"""Runs video2dataset's download stage with our own reader and frame extraction. Runs in video2dataset's environment only.

Two parts of release 1.3.0 (2024) are replaced here because of bugs: its reader accepts any HTTP response as a video, whatever its
status, and drops yt-dlp's error messages; its subsamplers crash, encode twice and fail on portrait video. Sharding, threads, processes,
incremental restart and statistics are still video2dataset's.

`python -m fvlm_core.data.video2dataset_plugin settings.json`
"""

import io
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
import video2dataset
import yt_dlp.utils
from pyarrow.fs import FileSystem
from video2dataset.workers import download_worker

from fvlm_core.data.frames import HTML_MARKS, ClipError, FrameRule, encode_jpeg, extract_frames
from fvlm_core.data.media import MediaError, open_media, time_window
from fvlm_core.data.parent import end_with_parent
from fvlm_core.data.rows import LOCAL, ORIGIN, PASSTHROUGH_COLUMNS, STORES

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".avi", ".mkv", ".m4v")
"""Suffixes of URLs that always mean a file. For any other URL that returns a page, yt-dlp is tried."""
PAGE_TYPES = (
    "text/html",
    "application/xhtml+xml",
    "application/vnd.apple.mpegurl",
    "application/x-mpegurl",
    "application/dash+xml",
    "application/json",
)
"""Content types of responses that are not videos, but in which yt-dlp may find one."""
PAGE_MARKS = (*HTML_MARKS, b"#extm3u")
VIDEO_MARKS = (b"\x1a\x45\xdf\xa3", b"RIFF")
"""First bytes of Matroska and WebM files, and of AVI files."""
REFUSED_TO_PROGRAMS = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS)
"""Statuses with which sites refuse scripts; yt-dlp may still succeed."""
FORMAT = "wv*[height>=360][ext=mp4]/w[height>=360][ext=mp4]/bv/b[ext=mp4]"
"""yt-dlp's format selector: the smallest video of at least 360 lines, without audio if possible."""
BLOCK_BYTES = 1 << 18
LEAST_BYTES_PER_S = 50_000
"""Minimum average rate of a download after `timeout_s`. Without it, an endless response would block its thread forever."""
REASON_CHARACTERS = 200
"""Maximum length of a failure reason; network errors may quote a complete URL."""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")

_local = threading.local()


class InFlightLimit:
    """Limits how many downloaded videos of this process wait in memory for frame extraction, to `threads`.

    video2dataset's own limit counts a failed video twice, so each failure would let one more video into memory.
    """

    places: threading.Semaphore | None = None
    _lock = threading.Lock()

    @classmethod
    def acquire(cls, most: int) -> None:
        """Wait for a free place, out of `most`."""
        with cls._lock:
            cls.places = cls.places or threading.Semaphore(most)
        cls.places.acquire()

    @classmethod
    def release(cls) -> None:
        """Free a place. Call once for every `acquire`."""
        if cls.places is not None:
            cls.places.release()


class PageError(ClipError):
    """The response is not a video, but yt-dlp may find one at that URL."""


class Reader:
    """Fetches one video: a local file, an object in a store, or the response of a web address. If the response is not a video, yt-dlp is
    tried."""

    max_bytes, threads = 0, 1
    """Maximum size of a video, and how many are held in memory at a time."""

    def __init__(self, encode_formats: dict[str, str], tmp_dir: str, reading_config: dict[str, Any]) -> None:
        self.timeout_s, self.temporary = reading_config["timeout"], tmp_dir
        self.max_bytes, self.threads = Reader.max_bytes, Reader.threads  # on the instance, so that they are pickled with it

    def __call__(self, row: tuple[int, str]) -> tuple[int, dict[str, bytes], dict[str, Any] | None, str | None]:
        """Fetch `(number, url)`; returns number, streams, metadata and error."""
        number, url = row
        InFlightLimit.acquire(self.threads)  # given back when its frames are extracted
        try:
            return number, {"video": self._read(url)}, None, None
        except ClipError as error:
            reason = str(error)
        except Exception as error:  # an uncaught one, e.g. from yt-dlp, fails the whole shard on every run
            reason = f"{type(error).__name__}: {error}"
        InFlightLimit.release()
        return number, {}, None, reason[:REASON_CHARACTERS]

    def _read(self, url: str) -> bytes:
        if url.startswith(LOCAL):
            return self._read_local(url.removeprefix(LOCAL))
        if url.lower().startswith(STORES):
            return self._read_object(url)
        try:
            return self._fetch(url)
        except PageError as error:
            if urlsplit(url).path.lower().endswith(VIDEO_SUFFIXES):
                raise
            try:
                return self._extract(url)
            except ClipError as second:
                raise ClipError(f"{error}; {second}") from second

    def _read_local(self, reference: str) -> bytes:
        """Read a file, a member of an archive or a cell of a table."""
        try:
            stream, size = open_media(reference)
        except MediaError as error:
            raise ClipError(str(error)) from error
        with stream:
            self._require_size(size)
            return stream.read()

    def _read_object(self, url: str) -> bytes:
        store, path = FileSystem.from_uri(url)
        try:
            with store.open_input_file(path) as stream:
                self._require_size(stream.size())
                return stream.read()
        except FileNotFoundError as error:
            raise ClipError("file not found") from error

    def _fetch(self, url: str) -> bytes:
        """Return the content of the response. Raises PageError if it is not a video."""
        if not hasattr(_local, "session"):
            _local.session = requests.Session()
        with _local.session.get(url, timeout=self.timeout_s, stream=True) as answer:
            if not answer.ok:
                kind = PageError if answer.status_code in REFUSED_TO_PROGRAMS else ClipError
                raise kind(f"HTTP {answer.status_code} {answer.reason}")
            self._require_size(int(answer.headers.get("Content-Length", 0)))
            content, started = io.BytesIO(), time.monotonic()
            for block in _blocks(answer):
                if not content.tell() and _is_page(answer.headers.get("Content-Type", ""), block):
                    raise PageError("a web page, not a video")
                content.write(block)
                self._require_size(content.tell())
                self._require_pace(content.tell(), time.monotonic() - started)
            return content.getvalue()

    def _require_size(self, size: int) -> None:
        if size > self.max_bytes:
            raise ClipError(f"larger than {self.max_bytes // 10**6} MB (max_video_mb)")

    def _require_pace(self, size: int, seconds: float) -> None:
        if seconds > self.timeout_s + size / LEAST_BYTES_PER_S:
            raise ClipError(f"too slow: {size:,} bytes in {seconds:.0f} s")

    def _extract(self, url: str) -> bytes:
        """Return the video that yt-dlp finds at a URL. Raises ClipError with its reason."""

        def hook(state: dict[str, Any]) -> None:  # yt-dlp does not know the size of a segmented stream in advance
            size = state.get("downloaded_bytes") or 0
            try:
                self._require_size(size)
                self._require_pace(size, state.get("elapsed") or 0)
            except ClipError as error:
                raise yt_dlp.utils.DownloadCancelled(str(error)) from error

        with tempfile.TemporaryDirectory(dir=self.temporary) as folder:
            options: dict[str, Any] = {
                "outtmpl": f"{folder}/video.%(ext)s",
                "format": FORMAT,
                "max_filesize": self.max_bytes,
                "socket_timeout": self.timeout_s,
                "cachedir": False,
                "noplaylist": True,
                "noprogress": True,
                "progress_hooks": [hook],
                "quiet": True,
                "no_warnings": True,
                "color": "no_color",
            }
            try:
                with yt_dlp.YoutubeDL(options) as downloader:
                    downloader.download([url])
            except yt_dlp.utils.YoutubeDLError as error:
                raise ClipError(f"yt-dlp: {COLOURS.sub('', str(error)).removeprefix('ERROR: ')}") from error
            found = [path for path in Path(folder).iterdir() if path.suffix != ".part"]
            if not found:
                raise ClipError(f"yt-dlp: no video there that is at most {self.max_bytes // 10**6} MB (max_video_mb)")
            return found[0].read_bytes()


def _blocks(answer: requests.Response) -> Iterator[bytes]:
    """Yield the content as it arrives. `iter_content` waits for a complete block, with no time limit."""
    try:
        while block := answer.raw.read1(BLOCK_BYTES, decode_content=True):
            yield block
    except urllib3.exceptions.ReadTimeoutError as error:
        raise requests.ConnectionError(error) from error
    except urllib3.exceptions.HTTPError as error:
        raise requests.exceptions.ChunkedEncodingError(error) from error


def _is_page(content_type: str, start: bytes) -> bool:
    """Whether a response that begins with `start` is a page (or a list of streams), not a video."""
    if start[4:8] == b"ftyp" or start.startswith(VIDEO_MARKS):  # video files, even if the server declares them as pages
        return False
    return content_type.lower().startswith(PAGE_TYPES) or start[:256].lstrip().lower().startswith(PAGE_MARKS)


class FrameSubsampler:
    """Replaces a video by its JPEG frames, `000000.jpg`, `000001.jpg`, ...; video2dataset writes them sorted by name."""

    encode_formats = {"video": "mp4"}

    def __init__(self, **rule: Any) -> None:
        self.rule = FrameRule(**rule)

    def __call__(
        self, streams: dict[str, list[bytes]], metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[bytes]], list[dict[str, Any]], str | None]:
        """Returns new streams, the metadata with num_frames and duration_s, and an error or None."""
        try:
            frames = extract_frames(streams["video"][0], self.rule, time_window(metadata[0][ORIGIN]))
        except ClipError as error:
            return {}, metadata, str(error)
        except Exception as error:  # an uncaught one would leave the failure without a reason
            return {}, metadata, f"{type(error).__name__}: {error}"
        finally:
            InFlightLimit.release()
        metadata[0] |= {"num_frames": len(frames.pixels), "duration_s": frames.duration_s}
        return {f"{number:06d}.jpg": [encode_jpeg(frame)] for number, frame in enumerate(frames.pixels)}, metadata, None


def main(settings: dict[str, Any]) -> None:
    """Download the videos of `table` (parquet of rows.DOWNLOAD_SCHEMA) into the folder `output`, on Spark if a master is given.

    `output` must not contain anything else.
    """
    spark = start_spark(settings["spark_master"]) if settings["spark_master"] else nullcontext()
    with spark:
        download(settings)


def start_spark(master: str) -> Any:
    """Start the Spark session for video2dataset's distributor. Its workers run this environment's Python, with this package."""
    from pyspark.sql import SparkSession  # imported only if Spark is used

    os.environ["PYSPARK_PYTHON"] = sys.executable
    session = SparkSession.builder.master(master).appName("fvlm precompute")
    settings = {
        "spark.executorEnv.PYTHONPATH": os.environ["PYTHONPATH"],
        "spark.ui.enabled": "false",
        "spark.task.maxFailures": "1",  # unfinished shards are left to the next run of the job
    }
    for name, value in settings.items():
        session = session.config(name, value)
    return session.getOrCreate()


def download(settings: dict[str, Any]) -> None:
    """Run video2dataset's download stage with our reader and frame extraction."""
    Reader.max_bytes, Reader.threads = settings["max_bytes"], settings["threads"]
    download_worker.VideoDataReader = Reader
    download_worker.FrameSubsampler = FrameSubsampler
    video2dataset.video2dataset(
        url_list=settings["table"],
        output_folder=settings["output"],
        output_format="webdataset",
        input_format="parquet",
        caption_col="caption",
        save_additional_columns=PASSTHROUGH_COLUMNS,
        incremental_mode="incremental",
        tmp_dir=settings["temporary"],
        config={
            "subsampling": {"FrameSubsampler": {"args": settings["rule"]}},
            "reading": {
                "yt_args": {"download_size": 360, "download_audio_rate": 44100, "yt_metadata_args": None},
                "timeout": settings["timeout_s"],
                "sampler": None,
            },
            "storage": {
                "number_sample_per_shard": settings["samples_per_shard"],
                "oom_shard_count": 5,
                "captions_are_subtitles": False,
            },
            "distribution": {
                "processes_count": settings["processes"],
                "thread_count": settings["threads"],
                "subjob_size": 1000,
                "distributor": "pyspark" if settings["spark_master"] else "multiprocessing",
            },
        },
    )


if __name__ in ("__main__", "__mp_main__"):  # the command itself and the children it spawns
    end_with_parent()
if __name__ == "__main__":
    # imported by name: Spark pickles the classes of __main__ by value, which fails for InFlightLimit's lock
    from fvlm_core.data import video2dataset_plugin

    video2dataset_plugin.main(json.loads(Path(sys.argv[1]).read_text()))
