"""The complete pipeline at ci size: a run on an empty volume, a cached rerun, and the same jobs without Prefect."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import Measurement, arguments, show
from deployments.checks import load_profile
from flows.registry import PHASES
from infra.prefect_settings import without
from tasks.direct import run_directly

REACH_S = {"ci_profile_s": 240.0, "cached_rerun_s": 11.0}
"""Seconds that the pipeline took on two idle cores before its phases had a registry."""


def main() -> None:
    options = arguments(__doc__ or "", profile={"default": "ci"})
    show(measure(options.profile), as_json=options.json)


def measure(profile: str) -> Iterator[Measurement]:
    """Time `fvlm speedrun` twice on one volume, then its steps without Prefect on another."""
    with tempfile.TemporaryDirectory() as folder:
        taken = {}
        for metric in ("ci_profile_s", "cached_rerun_s"):
            taken[metric] = _command(profile, Path(folder) / "volume")
            ratio = taken[metric] / REACH_S[metric]
            yield Measurement("pipeline", metric, taken[metric], "s", f"{REACH_S[metric]:.0f} s, before", ratio)
        started = time.monotonic()
        run_directly(list(PHASES.values()), load_profile(profile), Path(folder) / "direct")
        direct = time.monotonic() - started
        yield Measurement("pipeline", "without_prefect_s", direct, "s", "with Prefect", direct / taken["ci_profile_s"])
        share = 1 - direct / taken["ci_profile_s"]
        yield Measurement("pipeline", "prefect_overhead_share", share, "of the run", "the same jobs without Prefect", share)


def _command(profile: str, volume: Path) -> float:
    """Return the seconds of one `fvlm speedrun`, including the start and stop of its server."""
    command = [str(Path(sys.executable).with_name("fvlm")), "speedrun", "--profile", profile, "--volume", str(volume)]
    environment = without(os.environ)
    started = time.monotonic()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


if __name__ == "__main__":
    main()
