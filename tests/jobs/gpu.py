"""A tiny job that says which GPU it was given, and ends when as many runs have begun as there are GPUs."""

import os
import time
from pathlib import Path

from fvlm_core.cli import run_job
from fvlm_core.manifest import Manifest, file_entries
from fvlm_core.settings import Settings
from infra.devices import VISIBLE

WAIT_S = 60.0


class GpuJob(Settings):
    """Takes the file of its GPU in `busy`, which must be free."""

    output: Path
    value: int
    busy: Path
    gpus: int


def work(job: GpuJob) -> Manifest:
    gpu = os.environ[VISIBLE]
    job.output.mkdir(parents=True, exist_ok=True)
    (job.busy / gpu).touch(exist_ok=False)
    (job.busy / "begun" / str(job.value)).write_text(gpu)
    deadline = time.monotonic() + WAIT_S
    while len(list((job.busy / "begun").iterdir())) < job.gpus:
        assert time.monotonic() < deadline, "a GPU has nothing to do"
        time.sleep(0.05)
    (job.busy / gpu).unlink()
    (job.output / "gpu.txt").write_text(gpu)
    return Manifest(name="gpu", settings_hash=job.hash(), files=file_entries(job.output, ["gpu.txt"])).write(job.output)


if __name__ == "__main__":
    run_job(GpuJob, work)
