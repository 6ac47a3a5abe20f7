"""A tiny job for tests of the orchestration: counts its runs, reports progress, and fails in the ways its settings ask for."""

import os
import sys
import time
from pathlib import Path

from fvlm_core.cli import run_job
from fvlm_core.errors import UserError
from fvlm_core.manifest import Manifest, file_entries
from fvlm_core.progress import Progress
from fvlm_core.settings import Settings


class CountJob(Settings):
    """Writes `value` and the contents of its inputs into `value.txt`, and a line per run into `runs.txt` beside its folder."""

    output: Path
    value: int
    reads: tuple[Path, ...] = ()
    seconds: float = 0.0
    """Time it takes, in steps of 0.1 s that survive in `done.txt`: a killed run goes on from there."""
    refuse: bool = False
    fail_first: int = 0
    """The first runs that end with status 1."""


def count(job: CountJob) -> Manifest:
    job.output.mkdir(parents=True, exist_ok=True)
    if job.refuse:
        raise UserError("the value is bad", where="value", fix="give a good one")
    runs = job.output.parent / f"{job.output.name}.runs"
    with runs.open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    if len(runs.read_text().splitlines()) <= job.fail_first:
        print("failing on purpose", file=sys.stderr)
        sys.exit(1)
    done = job.output / "done.txt"
    total = round(job.seconds / 0.1)
    first = int(done.read_text()) if done.exists() else 0
    progress = Progress(job.output, total, first_step=first, interval_s=0)
    for step in range(first, total):
        time.sleep(0.1)
        done.write_text(str(step + 1))
        progress.update(step + 1, loss=1 / (step + 1))
    (job.output / "value.txt").write_text(" ".join([str(job.value), *((path / "value.txt").read_text() for path in job.reads)]))
    return Manifest(
        name="count", settings_hash=job.hash(), counts={"value": job.value}, files=file_entries(job.output, ["value.txt"])
    ).write(job.output)


if __name__ == "__main__":
    run_job(CountJob, count)
