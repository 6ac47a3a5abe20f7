"""Fetches rows of a record with video2dataset, in rounds: first all rows, then retries of those that failed for a temporary reason. If too
many failed, running the job again retries all that failed.

video2dataset runs in its own environment, as a child process, with our plug-in (`video2dataset_plugin`), in processes on this machine or
on a Spark cluster. It works in shards, and a shard is done when its statistics are written, so a killed download resumes where it
stopped. Each round has its own folder, `raw/ROUND/`, and nothing is fetched twice.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import fvlm_core
from fvlm_core.data.arrow import pc
from fvlm_core.data.jobs import DownloadJob
from fvlm_core.data.parts import Part, read_part
from fvlm_core.data.raw_shards import RAW, read_outcomes
from fvlm_core.data.rejected import is_transient
from fvlm_core.data.rows import COLUMNS, DOWNLOAD_SCHEMA, LOCAL
from fvlm_core.data.sources.record import PATH
from fvlm_core.manifest import write_atomically
from fvlm_core.progress import Progress
from fvlm_core.settings import Settings, hash_json

PLAN, LOG = "plan.json", "video2dataset.log"
PLUGIN = "fvlm_core.data.video2dataset_plugin"
LARGEST_SHARD = 1000
SHARDS_PER_PROCESS = 4
"""Minimum number of shards per process, so that processes end at about the same time."""
POLL_S = 0.2
LOG_LINES = 15
"""Lines of video2dataset's log quoted in an error."""
NOTHING = "video2dataset left nothing"


class Round(Settings):
    """One run of video2dataset on some rows."""

    videos: int
    samples_per_shard: int
    passing: bool = False
    """Whether it only retries rows that failed for a temporary reason."""

    @property
    def shards(self) -> int:
        """Number of shards that it makes."""
        return -(-self.videos // self.samples_per_shard)


class Plan(Settings):
    """The rounds of a download so far: `plan.json`."""

    identity: str
    """Hash of the rows to fetch and of the settings that affect their frames."""
    rounds: list[Round]


def fetch(job: DownloadJob, part: Part, folder: Path, wanted: Iterable[int], *, enough: Callable[[int], bool]) -> dict[int, str]:
    """Fetch the `wanted` rows of the record in `folder` into `job.output/raw/*/`; returns the rows that failed, with the reason.

    Rows that failed in an earlier run of the job are retried, unless `enough` returns True for their number.
    """
    plan = _plan(job, part)
    failed = dict.fromkeys(wanted, NOTHING)
    number, worked, retries = 0, False, job.retries
    while failed:
        if number == len(plan.rounds):
            passing = number > 0 and (worked or enough(len(failed)))
            rows = _rows(failed, passing=passing)
            if passing and not (worked and retries and rows):
                break
            retries -= passing
            plan = plan.model_copy(update={"rounds": [*plan.rounds, _round(job, len(rows), passing=passing)]})
            write_atomically(job.output / PLAN, plan.model_dump_json().encode())
        raw, planned = job.output / RAW / str(number), plan.rounds[number]
        rows = _rows(failed, passing=planned.passing)
        if _clean(raw) < planned.shards:
            worked = True
            _fetch_round(job, part, folder, raw, planned, np.array(rows, np.int64))
        good, reasons = read_outcomes(raw)
        failed = {row: reasons.get(row, NOTHING if row in rows else reason) for row, reason in failed.items() if row not in good}
        number += 1
    return failed


def environment() -> dict[str, str]:
    """Return the child's environment, in which it imports this very package."""
    return os.environ | {"PYTHONPATH": str(Path(fvlm_core.__file__).parents[1])}


def _rows(failed: dict[int, str], *, passing: bool) -> list[int]:
    """Return the failed rows that a round tries."""
    return [row for row, reason in failed.items() if not passing or is_transient(reason)]


def _plan(job: DownloadJob, part: Part) -> Plan:
    """Return the plan of an earlier run that fetched the same rows, or a new one. Files of a different download are deleted."""
    rule = [job.frame_px, job.fps, job.max_frames, job.max_video_mb, job.square_pixels]
    identity = hash_json([part.digest, rule])
    try:
        plan = Plan.model_validate_json((job.output / PLAN).read_bytes())
    except (OSError, ValueError):
        plan = None
    if plan is None or plan.identity != identity:
        shutil.rmtree(job.output / RAW, ignore_errors=True)
        plan = Plan(identity=identity, rounds=[])
    return plan


def _round(job: DownloadJob, videos: int, *, passing: bool) -> Round:
    shards = max(job.processes * SHARDS_PER_PROCESS, -(-videos // LARGEST_SHARD))
    samples = max(2, -(-videos // shards))  # video2dataset does not support shards of one sample
    return Round(videos=videos, samples_per_shard=samples, passing=passing)


def _clean(raw: Path) -> int:
    """Delete files that may be incomplete; returns the number of finished shards."""
    raw.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(raw / "_tmp", ignore_errors=True)
    for statistics in raw.glob("*_stats.json"):
        try:
            json.loads(statistics.read_text())
        except ValueError:  # truncated
            statistics.unlink()
    return _finished(raw)


def _finished(raw: Path) -> int:
    return len(list(raw.glob("*_stats.json")))


def _fetch_round(job: DownloadJob, part: Part, folder: Path, raw: Path, planned: Round, rows: np.ndarray) -> None:
    """Let video2dataset make the missing shards.

    Raises RuntimeError if some are still missing afterwards.
    """
    temporary = job.output / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    _write_input(folder, part, temporary / "input.parquet", rows)
    settings: dict[str, Any] = {
        "table": str(temporary / "input.parquet"),
        "output": str(raw),
        "temporary": str(temporary),
        "rule": {"frame_px": job.frame_px, "fps": job.fps, "max_frames": job.max_frames, "square_pixels": job.square_pixels},
        "max_bytes": job.max_video_mb * 10**6,
        "timeout_s": job.timeout_s,
        "samples_per_shard": planned.samples_per_shard,
        "processes": job.processes,
        "threads": job.threads,
        "spark_master": job.spark_master,
    }
    (temporary / "settings.json").write_text(json.dumps(settings))
    status = _run(job, [str(job.video2dataset_python), "-m", PLUGIN, str(temporary / "settings.json")], raw, planned)
    if status or _finished(raw) < planned.shards:
        undone = planned.shards - _finished(raw)
        tail = "\n".join((job.output / LOG).read_text(errors="replace").splitlines()[-LOG_LINES:])
        raise RuntimeError(f"video2dataset left {undone} of {planned.shards} shards undone; the end of {job.output / LOG}:\n{tail}")
    shutil.rmtree(temporary)


def _write_input(folder: Path, part: Part, path: Path, rows: np.ndarray) -> None:
    """Write the chosen rows of the record as video2dataset's input, with local files as paths."""
    with pq.ParquetWriter(path, DOWNLOAD_SCHEMA) as writer:
        for first, batch in read_part(folder, part, [*COLUMNS, PATH]):
            numbers = pa.array(np.arange(first, first + batch.num_rows))
            chosen = pc.is_in(numbers, pa.array(rows))
            batch, numbers = batch.filter(chosen), numbers.filter(chosen)
            urls = batch.column("url")
            paths = batch.column(PATH)
            fetched = pc.if_else(pc.is_valid(paths), pc.binary_join_element_wise(LOCAL, paths, ""), urls)
            others = [batch.column(name) for name in COLUMNS[1:]]
            writer.write_batch(pa.RecordBatch.from_arrays([numbers, urls, fetched, *others], schema=DOWNLOAD_SCHEMA))


def _run(job: DownloadJob, command: list[str], raw: Path, planned: Round) -> int:
    """Run video2dataset until it ends; returns its exit status."""
    progress = Progress(job.output, planned.videos)
    with (job.output / LOG).open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), start_new_session=True)
        try:
            while process.poll() is None:
                progress.update(min(_finished(raw) * planned.samples_per_shard, planned.videos - 1), note="videos")
                time.sleep(POLL_S)
        finally:
            _end(process)
    progress.update(planned.videos, note="videos")
    return process.returncode


def _end(process: subprocess.Popen) -> None:
    """Kill video2dataset and its children, which form their own process group."""
    if process.poll() is None:
        os.killpg(process.pid, 9)
        process.wait()
