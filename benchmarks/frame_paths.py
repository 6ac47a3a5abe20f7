"""Time three ways to extract frames from a clip. Runs in video2dataset's environment, as a subprocess of `benchmarks.frames`."""

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
    """Extract frames as JPEG; return their number."""
    try:
        return len([encode_jpeg(frame) for frame in extract_frames(content, RULE).pixels])
    except ClipError:
        return 0


def floor(content: bytes) -> int:
    """Decode every frame and discard it; return the number of frames."""
    with av.open(io.BytesIO(content), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return sum(1 for _ in container.decode(stream))


class Stock:
    """video2dataset's ResolutionSubsampler and FrameSubsampler, called in sequence as its worker does.

    They need patching to run: the worker reads `encode_formats`, which they lack, and the second changes a dict while iterating over it.
    Their result is an mp4 with one frame per second, which would still have to be split into JPEG files.
    """

    def __init__(self) -> None:
        from video2dataset.subsamplers import FrameSubsampler, ResolutionSubsampler

        self.subsamplers = ResolutionSubsampler(video_size=224, resize_mode="scale,crop"), FrameSubsampler(frame_rate=1)

    def __call__(self, content: bytes) -> bytes | None:
        """Return the mp4, or None on failure."""
        streams: Any = {"video": [content]}
        for subsampler in self.subsamplers:
            streams, _, error = subsampler(dict(streams), [{}])
            if error is not None:
                return None
        return streams["video"][0]


def cpu_s(function: Callable[[], Any]) -> tuple[float, Any]:
    """Run `function`; return the CPU seconds of this process and its finished children, and the result."""
    before = _used()
    result = function()
    return _used() - before, result


def _used() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in both)


def find_ffmpeg(folder: Path) -> None:
    """If there is no `ffmpeg` on PATH, link imageio-ffmpeg's binary under that name, which ffmpeg-python looks for."""
    if shutil.which("ffmpeg") is None:
        import imageio_ffmpeg

        (folder / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"


def side_by_side(clips: list[str], rounds: int) -> None:
    """Print a JSON line per clip with the frames and median CPU seconds of each path; the paths run in turn."""
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
    """The pool's worker function."""
    return ours(Path(path).read_bytes())


def together(clips: list[str], processes: int) -> None:
    """Print frames and wall seconds for all clips, several times each, on `processes` processes."""
    longest_first = sorted(clips, key=os.path.getsize, reverse=True)  # so that all processes finish at about the same time
    work = longest_first * max(2, 2 * processes)
    with get_context("spawn").Pool(processes) as pool:
        pool.map(frames_of, clips[:1] * processes)  # warm up: every process has done its imports
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
