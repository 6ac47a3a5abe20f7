"""Lets video2dataset fetch the rows of a record, in rounds: all of them, then, where too many failed, those that failed once more.

video2dataset runs in an environment of its own, as a child process, with our plug-in (`video2dataset_plugin`). Local files are
served to it over HTTP. It works in shards; a shard is done when its statistics are written, so a killed download goes on where it was.
A round has a folder of its own, `raw/ROUND/`, and nothing that was fetched is fetched again.
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
from fvlm_core.data.raw_shards import read_outcomes
from fvlm_core.data.rows import COLUMNS, DOWNLOAD_SCHEMA
from fvlm_core.data.serve import FileServer
from fvlm_core.data.sources.record import PATH, Record, read_rows
from fvlm_core.manifest import write_atomically
from fvlm_core.progress import Progress
from fvlm_core.settings import Settings, hash_json

RAW, PLAN, LOG = "raw", "plan.json", "video2dataset.log"
PLUGIN = "fvlm_core.data.video2dataset_plugin"
LARGEST_SHARD = 1000
SHARDS_PER_PROCESS = 4
"""At least, so that processes end together; fewer and larger shards where there are many videos."""
POLL_S = 0.2
LOG_LINES = 15
"""Of video2dataset's log, in an error."""
NOTHING = "video2dataset left nothing"


class Round(Settings):
    """One time that video2dataset is given rows."""

    videos: int
    samples_per_shard: int

    @property
    def shards(self) -> int:
        """Shards that it leaves."""
        return -(-self.videos // self.samples_per_shard)


class Plan(Settings):
    """The rounds of a download so far: `plan.json`."""

    identity: str
    """Of what is fetched, and how it is cut into frames."""
    rounds: list[Round]


def fetch(job: DownloadJob, record: Record, folder: Path, wanted: Iterable[int], *, enough: Callable[[int], bool]) -> dict[int, str]:
    """Fetch the `wanted` rows of the record in `folder` into `job.output/raw/*/`; returns the rows that failed, with the reason.

    Rows that failed in an earlier run of the job are tried again unless they are few `enough`.
    """
    plan = _plan(job, record)
    failed = dict.fromkeys(wanted, NOTHING)
    number, worked = 0, False
    while failed:
        if number == len(plan.rounds):
            if number and (worked or enough(len(failed))):
                break
            plan = plan.model_copy(update={"rounds": [*plan.rounds, _round(job, len(failed))]})
            write_atomically(job.output / PLAN, plan.model_dump_json().encode())
        raw = job.output / RAW / str(number)
        if _clean(raw) < plan.rounds[number].shards:
            worked = True
            _fetch_round(job, folder, raw, plan.rounds[number], np.fromiter(failed, np.int64, len(failed)))
        good, reasons = read_outcomes(raw)
        failed = {row: reasons.get(row, NOTHING) for row in failed if row not in good}
        number += 1
    return failed


def environment() -> dict[str, str]:
    """The child imports this very package, and never asks a proxy for a local file."""
    ours = str(Path(fvlm_core.__file__).parents[1])
    direct = ",".join(filter(None, [os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")), "127.0.0.1"]))
    return os.environ | {"PYTHONPATH": ours, "NO_PROXY": direct, "no_proxy": direct}


def _plan(job: DownloadJob, record: Record) -> Plan:
    """The plan of an earlier run that fetched the same, or a new one; what another download left is deleted."""
    rule = [job.frame_px, job.fps, job.max_frames, job.max_video_mb, job.square_pixels]
    identity = hash_json([record.digest, rule])
    try:
        plan = Plan.model_validate_json((job.output / PLAN).read_bytes())
    except (OSError, ValueError):
        plan = None
    if plan is None or plan.identity != identity:
        shutil.rmtree(job.output / RAW, ignore_errors=True)
        plan = Plan(identity=identity, rounds=[])
    return plan


def _round(job: DownloadJob, videos: int) -> Round:
    shards = max(job.processes * SHARDS_PER_PROCESS, -(-videos // LARGEST_SHARD))
    return Round(videos=videos, samples_per_shard=max(2, -(-videos // shards)))  # video2dataset cannot count to 1


def _clean(raw: Path) -> int:
    """Delete what is not known to be complete; returns the number of finished shards."""
    raw.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(raw / "_tmp", ignore_errors=True)
    for statistics in raw.glob("*_stats.json"):
        try:
            json.loads(statistics.read_text())
        except ValueError:  # cut short when it was written
            statistics.unlink()
    return _finished(raw)


def _finished(raw: Path) -> int:
    return len(list(raw.glob("*_stats.json")))


def _fetch_round(job: DownloadJob, folder: Path, raw: Path, planned: Round, rows: np.ndarray) -> None:
    """Serve the local files among the rows and let video2dataset make the shards that are not there yet.

    Raises RuntimeError if it leaves any undone.
    """
    temporary = job.output / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    paths = pa.chunked_array([batch.column(PATH) for batch in read_rows(folder, [PATH])], pa.string())

    def find(path: str) -> str | None:
        number = path.removeprefix("/")
        return paths[int(number)].as_py() if number.isdecimal() and int(number) < len(paths) else None

    with FileServer(find) as server:
        _write_input(folder, temporary / "input.parquet", rows, server.url)
        settings: dict[str, Any] = {
            "table": str(temporary / "input.parquet"),
            "output": str(raw),
            "temporary": str(temporary),
            "served": f"{server.url}/",
            "rule": {"frame_px": job.frame_px, "fps": job.fps, "max_frames": job.max_frames, "square_pixels": job.square_pixels},
            "max_bytes": job.max_video_mb * 10**6,
            "timeout_s": job.timeout_s,
            "samples_per_shard": planned.samples_per_shard,
            "processes": job.processes,
            "threads": job.threads,
        }
        (temporary / "settings.json").write_text(json.dumps(settings))
        status = _run(job, [str(job.video2dataset_python), "-m", PLUGIN, str(temporary / "settings.json")], raw, planned)
    if status or _finished(raw) < planned.shards:
        undone = planned.shards - _finished(raw)
        tail = "\n".join((job.output / LOG).read_text(errors="replace").splitlines()[-LOG_LINES:])
        raise RuntimeError(f"video2dataset left {undone} of {planned.shards} shards undone; the end of {job.output / LOG}:\n{tail}")
    shutil.rmtree(temporary)


def _write_input(folder: Path, path: Path, rows: np.ndarray, served: str) -> None:
    """The chosen rows of the record as video2dataset reads them: local files by their address on the server."""
    first = 0
    with pq.ParquetWriter(path, DOWNLOAD_SCHEMA) as writer:
        for batch in read_rows(folder, [*COLUMNS, PATH]):
            numbers = pa.array(np.arange(first, first + batch.num_rows))
            first += batch.num_rows
            chosen = pc.is_in(numbers, pa.array(rows))
            batch, numbers = batch.filter(chosen), numbers.filter(chosen)
            urls = batch.column("url")
            addresses = pc.binary_join_element_wise(f"{served}/", numbers.cast(pa.string()), "")
            fetched = pc.if_else(pc.is_valid(batch.column(PATH)), addresses, urls)
            others = [batch.column(name) for name in COLUMNS[1:]]
            writer.write_batch(pa.RecordBatch.from_arrays([numbers, urls, fetched, *others], schema=DOWNLOAD_SCHEMA))


def _run(job: DownloadJob, command: list[str], raw: Path, planned: Round) -> int:
    """Run video2dataset to its end; returns its exit status."""
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
    """End video2dataset and its children, which are a group of their own."""
    if process.poll() is None:
        os.killpg(process.pid, 9)
        process.wait()
