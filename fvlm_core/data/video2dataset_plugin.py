"""Runs video2dataset's download stage with our own reader and frame extraction. For video2dataset's environment only.

Release 1.3.0 (2024) has faults in the two parts that are replaced here: its reader takes any HTTP answer for a video, whatever its
status, and its subsamplers crash, re-encode twice and fail on portrait video. Sharding, threads, processes, incremental
restart, statistics and yt-dlp stay video2dataset's own.

`python -m fvlm_core.data.video2dataset_plugin settings.json`
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import video2dataset  # pyright: ignore[reportMissingImports] -- as all of that environment
from video2dataset.data_reader import YtDlpDownloader  # pyright: ignore[reportMissingImports]
from video2dataset.workers import download_worker  # pyright: ignore[reportMissingImports]

from fvlm_core.data.frames import ClipError, FrameRule, encode_jpeg, extract_frames

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".avi", ".mkv", ".m4v")
"""Of URLs that are fetched as they are; all others go to yt-dlp."""
PARENT_CHECK_S = 0.5
REASON_CHARACTERS = 200
"""Of an error of the network, which may quote a whole URL."""
EXTRA_COLUMNS = ["row", "origin", "source", "kind", "split", "conversations", "probes", "extra"]
"""Columns of the input that go into the samples' JSON, beside url and caption."""

_local = threading.local()


class Reader:
    """Fetches one video; an answer that is not a success is an error."""

    served = ""
    """URLs that start so are files, whatever their names."""

    def __init__(self, encode_formats: dict[str, str], tmp_dir: str, reading_config: dict[str, Any]) -> None:
        self.timeout_s, self.served = reading_config["timeout"], Reader.served
        self.yt_dlp = YtDlpDownloader(reading_config["yt_args"], tmp_dir, encode_formats)

    def __call__(self, row: tuple[int, str]) -> tuple[int, dict[str, bytes], dict[str, Any] | None, str | None]:
        """(number, url) -> number, streams, metadata, error."""
        number, url = row
        try:
            if url.startswith(self.served) or urlsplit(url).path.lower().endswith(VIDEO_SUFFIXES):
                return number, {"video": self._fetch(url)}, None, None
            return number, {"video": self._extract(url)}, None, None
        except ClipError as error:
            return number, {}, None, str(error)
        except (requests.RequestException, OSError, ValueError) as error:
            return number, {}, None, f"{type(error).__name__}: {error}"[:REASON_CHARACTERS]

    def _fetch(self, url: str) -> bytes:
        if not hasattr(_local, "session"):
            _local.session = requests.Session()
        answer = _local.session.get(url, timeout=self.timeout_s)
        if not answer.ok:
            raise ClipError(f"HTTP {answer.status_code} {answer.reason}")
        return answer.content

    def _extract(self, url: str) -> bytes:
        """The video behind a page that yt-dlp knows."""
        paths, _, _ = self.yt_dlp(url)
        if "video" not in paths:
            raise ClipError("yt-dlp found no video there")
        path = Path(paths["video"])
        try:
            return path.read_bytes()
        finally:
            path.unlink()


class FrameSubsampler:
    """Replaces a video by its JPEG frames, `000.jpg`, `001.jpg`, ..."""

    encode_formats = {"video": "mp4"}

    def __init__(self, **rule: Any) -> None:
        self.rule = FrameRule(**rule)

    def __call__(
        self, streams: dict[str, list[bytes]], metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[bytes]], list[dict[str, Any]], str | None]:
        """Returns new streams, the metadata with num_frames and duration_s, and an error or None."""
        try:
            frames = extract_frames(streams["video"][0], self.rule)
        except ClipError as error:
            return {}, metadata, str(error)
        metadata[0] |= {"num_frames": len(frames.pixels), "duration_s": frames.duration_s}
        return {f"{number:03d}.jpg": [encode_jpeg(frame)] for number, frame in enumerate(frames.pixels)}, metadata, None


def main(settings: dict[str, Any]) -> None:
    """Download `table` (parquet with url, caption and EXTRA_COLUMNS) into `output`, which holds nothing else."""
    Reader.served = settings["served"]
    download_worker.VideoDataReader = Reader
    download_worker.FrameSubsampler = FrameSubsampler
    video2dataset.video2dataset(
        url_list=settings["table"],
        output_folder=settings["output"],
        output_format="webdataset",
        input_format="parquet",
        caption_col="caption",
        save_additional_columns=EXTRA_COLUMNS,
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
                "distributor": "multiprocessing",
            },
        },
    )


def end_with_parent() -> None:
    """End this process once whoever started it is gone, so that nothing goes on writing next to a restarted download."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


if __name__ in ("__main__", "__mp_main__"):  # the command itself and the children it spawns
    end_with_parent()
if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
