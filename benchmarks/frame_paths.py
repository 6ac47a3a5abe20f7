"""The three ways from a clip to its frames, timed side by side; runs in video2dataset's environment, for `benchmarks.frames`."""

import io
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av

from fvlm_core.data.frames import ClipError, FrameRule, encode_jpeg, extract_frames

RULE = FrameRule(frame_px=224)


def ours(content: bytes) -> int:
    """Frames as JPEG; how many."""
    try:
        return len([encode_jpeg(frame) for frame in extract_frames(content, RULE).pixels])
    except ClipError:
        return 0


def floor(content: bytes) -> int:
    """Every picture decoded, and nothing done with it; how many."""
    with av.open(io.BytesIO(content), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return sum(1 for _ in container.decode(stream))


class Stock:
    """video2dataset's ResolutionSubsampler and FrameSubsampler, one after the other as its worker calls them.

    Patched so that they run at all: the worker reads `encode_formats`, which they lack, and the second changes the dict that is iterated.
    Their result is an mp4 of one frame per second; it would still have to be cut into JPEG files.
    """

    def __init__(self) -> None:
        from video2dataset.subsamplers import FrameSubsampler, ResolutionSubsampler

        self.subsamplers = ResolutionSubsampler(video_size=224, resize_mode="scale,crop"), FrameSubsampler(frame_rate=1)

    def __call__(self, content: bytes) -> bytes | None:
        """The mp4, or None where it fails."""
        streams: Any = {"video": [content]}
        for subsampler in self.subsamplers:
            streams, _, error = subsampler(dict(streams), [{}])
            if error is not None:
                return None
        return streams["video"][0]


def cpu_s(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process and its ended children."""
    before = _used()
    result = function()
    return _used() - before, result


def _used() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in both)


def find_ffmpeg(folder: Path) -> None:
    """Put imageio-ffmpeg's program on PATH under the name that ffmpeg-python looks for, where there is no other."""
    if shutil.which("ffmpeg") is None:
        import imageio_ffmpeg

        (folder / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"


def side_by_side(clips: list[str], rounds: int) -> None:
    """Print a line per clip: frames and median CPU seconds of each path, in turn."""
    stock = Stock()
    for path in clips:
        content = Path(path).read_bytes()
        paths: dict[str, Callable[[bytes], Any]] = {"ours": ours, "stock": stock, "floor": floor}
        taken = {name: [] for name in paths}
        results: dict[str, Any] = {}
        for _ in range(rounds):
            for name, function in paths.items():
                seconds, results[name] = cpu_s(partial(function, content))
                taken[name].append(seconds)
        frames = {"ours": results["ours"], "stock": floor(results["stock"]) if results["stock"] else 0, "floor": results["floor"]}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps({name: {"frames": frames[name], "cpu_s": statistics.median(taken[name]), "peak_gb": peak} for name in paths}))


def frames_of(path: str) -> int:
    """For a process of a pool."""
    return ours(Path(path).read_bytes())


def together(clips: list[str], processes: int) -> None:
    """Print frames and seconds of all clips, several times over, on so many processes."""
    longest_first = sorted(clips, key=os.path.getsize, reverse=True)  # so that all processes end together
    work = longest_first * max(2, 2 * processes)
    with get_context("spawn").Pool(processes) as pool:
        pool.map(frames_of, clips[:1] * processes)  # everybody has imported what it needs
        started = time.perf_counter()
        frames = sum(pool.imap_unordered(frames_of, work))
        print(json.dumps({"frames": frames, "wall_s": time.perf_counter() - started}))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    if "processes" in asked:
        together(asked["clips"], asked["processes"])
    else:
        with tempfile.TemporaryDirectory() as programs:
            find_ffmpeg(Path(programs))
            side_by_side(asked["clips"], asked["rounds"])
