"""Precompute on two workers of the CPU pool, through real deployments, and one of the workers is lost in the middle."""

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import get_client

from deployments.register import register
from deployments.watch import RUN_VARIABLE, trigger
from flows.precompute import PRECOMPUTE, SHARDS
from fvlm_core.data.clips import make_clips
from fvlm_core.data.jobs import ClipJob, DownloadManifest
from fvlm_core.data.rows import SPLITS
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.manifest import FILE_NAME
from infra.processes import marked
from infra.stack import REPOSITORY, Stack, queue_name
from infra.volume import volume_id
from tasks.config import PipelineConfig
from tasks.phase import EarlierResults
from tests.data.test_download import WebSite, needs_video2dataset
from tests.tiny import precompute_values
from tests.waiting import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow(reason="a real server, two workers and their flow runs"), needs_video2dataset]

CLIPS, PART = 6, 2


@contextmanager
def workers(stack: Stack, config: PipelineConfig, volume: Path, count: int) -> Iterator[list[psutil.Process]]:
    """Workers of the CPU pool that take one run each."""
    pool = config.machine.pools.cpu
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool.name, "--type", pool.type, "--limit", "1"]
    command += ["--work-queue", queue_name(volume_id(volume)), "--name"]
    started = [
        subprocess.Popen([*command, f"worker {number}"], env=stack.environment(), cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        for number in range(count)
    ]
    try:
        yield [psutil.Process(process.pid) for process in started]
    finally:
        for process in started:
            lose(psutil.Process(process.pid))
            process.wait()


def lose(worker: psutil.Process) -> None:
    """SIGKILL for the worker and the flow run that it started, as when their machine goes down."""
    for process in (worker, *(worker.children() if worker.is_running() else [])):
        process.kill()


def profile(folder: Path, urls: list[str]) -> PipelineConfig:
    """Parts of two clips, each made by whichever of two runs comes first."""
    values = precompute_values(folder, urls, part_samples=PART, timeout_s=500)
    values["machine"] = values.get("machine", {}) | {"precompute_workers": 2, "parallel_jobs": 1}
    return PipelineConfig.from_values(values, where="test", folder=folder)


def test_what_a_lost_worker_was_making_is_made_by_the_other(prefect_api: Stack, tmp_path: Path) -> None:
    made = make_clips(ClipJob.model_validate({"output": tmp_path, "sources": {"gaze": {"task": "caption", "train": CLIPS, "val": 0}}}))
    assert made.counts["clips"] == CLIPS
    clips = sorted((tmp_path / "clips").glob("*.mp4"))
    volume = tmp_path / "volume"
    volume.mkdir()
    site = WebSite(tmp_path)
    site.held = (clips[0].name,)
    config = profile(tmp_path, [f"{site.url}/clips/{clips[0].name}", *map(str, clips[1:])])
    PRECOMPUTE.prepare(config, volume)
    steps = PRECOMPUTE.steps(config, EarlierResults(volume, {}, {}, {}))
    first, second, third = (volume / step.folder for step in steps if step.name.startswith("download-web"))
    registered = asyncio.run(register(config, volume))
    site.gate.clear()
    try:
        with workers(prefect_api, config, volume, 2) as both:
            run = trigger(config, "precompute", registered.deployment)
            # its own run waits for the first clip; the helper begins in the middle
            wait_until(lambda: (third / "video2dataset.log").exists(), "the helper to be at its second part")
            engines = {process.environ()[RUN_VARIABLE]: worker for worker in both for process in worker.children()}
            (helper,) = set(engines) - {str(run)}
            assert engines[helper] != engines[str(run)], "each worker has taken one of the two runs"
            of_helper = DownloadManifest.read(second).created_at
            assert not any((folder / FILE_NAME).exists() for folder in (first, third))
            lose(engines[helper])
            wait_until(lambda: not list(marked(RUN_VARIABLE, helper)), "the job of the lost run to end")
            site.gate.set()

            def ended() -> bool:
                with get_client(sync_client=True) as client:
                    state = client.read_flow_run(run).state
                return state is not None and state.is_final()

            wait_until(ended, "precompute", poll_s=1)
    finally:
        site.gate.set()
        site.server.shutdown()
        site.server.server_close()
    assert DownloadManifest.read(second).created_at == of_helper, "what the helper had finished stays"
    (folder,) = volume.glob(f"steps/{SHARDS}-*")
    shards = ShardSet(folder)
    origins = Counter(shards.record(int(row))["caption"] for split in SPLITS for row in shards.rows(split, "web").index)
    assert origins == {f"clip {number}": 1 for number in range(CLIPS)}, "nothing is lost, nothing is there twice"
    assert shards.manifest.lost == []
