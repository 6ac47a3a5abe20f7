"""Kills precompute again and again: `python -m tests.campaign.precompute_kills --kills 20`.

A source of clips, some of which cannot be used, goes through the real steps (parts through video2dataset, then the shards), in a process
that is killed with SIGKILL at random moments and started again, until it ends. Then everything has to be as if it had never been killed:
the shards' bytes, every sample once, every loss with its reason; and no part that was finished is made again.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.report import Measurement, show
from flows.precompute import PRECOMPUTE, SHARDS
from fvlm_core.data.clips import make_clips
from fvlm_core.data.jobs import ClipJob, ShardManifest
from fvlm_core.data.rows import SPLITS
from fvlm_core.data.shard_set import ShardSet
from tasks.config import PipelineConfig
from tasks.direct import run_directly
from tests.tiny import precompute_values

CLIPS, PART = 15, 6
LONGEST_S = 6.0
"""Between a start and the kill, at most; from there on it grows, so that every run gets further sooner or later."""
GROWTH = 1.1


@dataclass(frozen=True)
class Outcome:
    """What was left in the end."""

    kills: int
    same_bytes: bool
    """As of a run that was never killed."""
    lost: int
    """Samples that are neither in a shard nor among those left out."""
    twice: int
    """Samples that are in the shards more than once."""
    remade: int
    """Parts that were made again after they were finished."""


def profile(folder: Path) -> PipelineConfig:
    """A profile of one source of CLIPS good clips in parts of PART, and one bad clip in each part."""
    made = make_clips(ClipJob.model_validate({"output": folder, "sources": {"gaze": {"task": "caption", "train": CLIPS, "val": 0}}}))
    assert made.counts["clips"] == CLIPS
    urls = [f"clips/{path.name}" for path in sorted((folder / "clips").glob("*.mp4"))]
    for place in range(0, CLIPS + 3, PART):
        urls.insert(place, f"clips/gone-{place}.mp4")
    values = precompute_values(folder, urls, part_samples=PART, max_bad_share=0.5)
    values["precompute"]["shards"] |= {"samples_per_shard": 2, "processes": 2}
    return PipelineConfig.from_values(values, where="campaign", folder=folder)


def campaign(folder: Path, kills: int, seed: int) -> Outcome:
    """Run once undisturbed, once with kills; compare."""
    config = profile(folder / "source")
    config.to_yaml(folder / "profile.yaml")
    volumes = {name: folder / name for name in ("undisturbed", "killed")}
    expected = volumes["undisturbed"] / run_directly([PRECOMPUTE], config, volumes["undisturbed"])["precompute"].steps[SHARDS].folder
    rng, longest, landed, finished = random.Random(seed), LONGEST_S, 0, {}
    remade = 0
    while True:
        process = subprocess.Popen([sys.executable, "-m", __spec__.name, "--run", str(folder / "profile.yaml"), str(volumes["killed"])])
        deadline = time.monotonic() + (rng.uniform(0.5, longest) if landed < kills else 600)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.poll() is None:
            end(process)
            landed, longest = landed + 1, longest * GROWTH
            print(f"kill {landed}/{kills}", file=sys.stderr, flush=True)
        elif process.returncode:
            raise RuntimeError(f"it failed by itself, with status {process.returncode}")
        now = {path: path.stat().st_mtime_ns for path in volumes["killed"].glob("steps/download-*/manifest.json")}
        remade += sum(now.get(path) != made for path, made in finished.items())
        finished = now
        if process.returncode == 0:
            break
    (made,) = volumes["killed"].glob(f"steps/{SHARDS}-*")
    return compare(expected, made, landed, remade)


def end(process: subprocess.Popen) -> None:
    """Kill the process alone: what it has started has to end by itself. Wait until that is so."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    if alive:
        raise RuntimeError(f"these outlive their parent: {alive}")


def compare(expected: Path, made: Path, kills: int, remade: int) -> Outcome:
    """Of two folders of shards, the second one of which should be as the first."""
    one, two = ShardManifest.read(expected), ShardManifest.read(made)
    known = ShardSet(made)
    origins = Counter(known.record(int(row))["origin"] for split in SPLITS for row in known.rows(split, "web").index)
    left_out = {clip.url for clip in two.bad if clip.source == "web"}
    assert len(left_out) == sum(loss.samples for loss in two.lost if loss.source == "web")
    return Outcome(
        kills=kills,
        same_bytes=one.files == two.files and one.lost == two.lost and two.problems(made) == [],
        lost=CLIPS + sum(loss.samples for loss in one.lost if loss.source == "web") - len({*origins} | left_out),
        twice=sum(number > 1 for number in origins.values()),
        remade=remade,
    )


def measurements(outcome: Outcome) -> list[Measurement]:
    """The outcome in the benchmarks' form."""
    never = "a run that was never killed"
    return [
        Measurement("precompute_kills", "kills", outcome.kills, "SIGKILLs"),
        Measurement("precompute_kills", "bytes_equal", float(outcome.same_bytes), "1 or 0", reference=never),
        Measurement("precompute_kills", "samples_lost", outcome.lost, "samples"),
        Measurement("precompute_kills", "samples_twice", outcome.twice, "samples"),
        Measurement("precompute_kills", "finished_parts_made_again", outcome.remade, "parts"),
    ]


def main() -> int:
    """The campaign, or one run of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--run", nargs=2, type=Path, metavar=("PROFILE", "VOLUME"), help="only make the steps, which is what is killed")
    asked = parser.parse_args()
    if asked.run:
        run_directly([PRECOMPUTE], PipelineConfig.from_yaml(asked.run[0]), asked.run[1])
        return 0
    with tempfile.TemporaryDirectory(prefix="fvlm-kills-") as folder:
        outcome = campaign(Path(folder), asked.kills, asked.seed)
    show(measurements(outcome), as_json=asked.json)
    return int(not outcome.same_bytes or bool(outcome.lost or outcome.twice or outcome.remade))


if __name__ == "__main__":
    sys.exit(main())
