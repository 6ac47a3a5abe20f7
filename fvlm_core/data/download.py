"""Fetches a table of videos through video2dataset and keeps their frames.

video2dataset runs in an environment of its own, as a child process, with our plug-in (`video2dataset_plugin`). Local files are
served to it over HTTP. It works in shards; a shard is done when its statistics are written, so a killed download goes on
where it was. Videos that fail are listed, and tolerated up to a share.
"""

import csv
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

import fvlm_core
from fvlm_core.cli import run_job
from fvlm_core.data.jobs import BadClip, DownloadJob, DownloadManifest
from fvlm_core.data.raw_shards import RawSample, read_failures, read_samples
from fvlm_core.data.serve import FileServer
from fvlm_core.data.sources import table, webvid
from fvlm_core.errors import UserError
from fvlm_core.manifest import file_entries, write_atomically
from fvlm_core.progress import Progress
from fvlm_core.settings import hash_json

RAW, PLAN, CONTENT, BAD, LOG = "raw", "plan.json", "content.parquet", "bad.csv", "video2dataset.log"
PLUGIN = "fvlm_core.data.video2dataset_plugin"
LARGEST_SHARD = 1000
SHARDS_PER_PROCESS = 4
"""At least, so that processes end together; fewer and larger shards where there are many videos."""
POLL_S = 0.2
SHOWN_BAD = 5
"""Failed videos named in an error; `bad.csv` has them all."""
LOG_LINES = 15
"""Of video2dataset's log, in an error."""
CHECK = f"import av, {PLUGIN}; assert 'h264' in av.codecs_available, 'PyAV cannot decode H.264'"


def download(job: DownloadJob) -> DownloadManifest:
    """Fetch everything. Raises UserError for a bad table, a missing environment, or too many videos that fail."""
    started = time.monotonic()
    rows = read_table(job)
    _check_environment(job)
    job.output.mkdir(parents=True, exist_ok=True)
    bad: dict[int, str] = {number: f"no {name}" for number, row in enumerate(rows) for name in table.REQUIRED if not row[name]}
    wanted: list[dict[str, Any]] = [row | {"row": number, "origin": row["url"]} for number, row in enumerate(rows) if number not in bad]
    samples: list[RawSample] = []
    if wanted:
        _fetch(job, wanted)
        samples = read_samples(job.output / RAW)
        bad |= read_failures(job.output / RAW)
        good = {sample.record["row"] for sample in samples}
        bad |= {row["row"]: "video2dataset left nothing" for row in wanted if row["row"] not in good | bad.keys()}
    clips = {number: BadClip(url=rows[number]["url"], reason=reason) for number, reason in sorted(bad.items())}
    _write_bad(job.output / BAD, clips)
    _judge(job, len(rows), list(clips.values()))
    columns = ("row", "origin", "source", "kind", "split", "num_frames", "duration_s")
    content = [{name: sample.record[name] for name in columns} | {"sha256": sample.identity()} for sample in samples]
    pd.DataFrame(content).to_parquet(job.output / CONTENT, index=False)
    frames = sum(sample.record["num_frames"] for sample in samples)
    return DownloadManifest(
        name="download",
        settings_hash=job.hash(exclude={"output", "table", "serve", "video2dataset_python", "processes", "threads", "timeout_s"}),
        counts={"videos": len(rows), "good": len(samples), "bad": len(clips), "frames": frames},
        files=file_entries(job.output, [CONTENT]) + file_entries(job.output, [f"{RAW}/*.tar", BAD], identity=False),
        frame_px=job.frame_px,
        fps=job.fps,
        bad=list(clips.values()),
        seconds=time.monotonic() - started,
    ).write(job.output)


def read_table(job: DownloadJob) -> list[table.Row]:
    """The job's table, checked. Raises UserError; cheap enough to be called before anything is started."""
    return webvid.read_videos(job.table) if job.format == "webvid" else table.read_videos(job.table, source=job.source)


def _check_environment(job: DownloadJob) -> None:
    fix = "run ./infra/video2dataset_env.sh"
    try:
        result = subprocess.run([job.video2dataset_python, "-c", CHECK], capture_output=True, text=True, env=_environment(), check=False)
    except OSError as error:
        raise UserError("video2dataset's environment is missing", where=str(job.video2dataset_python), fix=fix) from error
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(f"video2dataset's environment does not work: {reason[0]}", where=str(job.video2dataset_python), fix=fix)


def _environment() -> dict[str, str]:
    """The child imports this very package, and never asks a proxy for a local file."""
    ours = str(Path(fvlm_core.__file__).parents[1])
    direct = ",".join(filter(None, [os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")), "127.0.0.1"]))
    return os.environ | {"PYTHONPATH": ours, "NO_PROXY": direct, "no_proxy": direct}


def _local(job: DownloadJob, url: str) -> Path | None:
    """The file a url names, or None if it is a web address."""
    if url.startswith(("http://", "https://")):
        return None
    return (job.serve or job.table.parent) / url.removeprefix("file://")


def _fetch(job: DownloadJob, rows: list[dict[str, Any]]) -> None:
    """Serve the local files among the rows and let video2dataset fetch them all."""
    files: dict[str, Path] = {}
    paths: dict[int, str] = {}
    for row in rows:
        if path := _local(job, row["url"]):
            paths[row["row"]] = f"/{row['row']}/{quote(path.name)}"
            files[paths[row["row"]]] = path
    with FileServer(files) as server:
        served = [row | {"url": server.url + paths[row["row"]]} if row["row"] in paths else row for row in rows]
        _run(job, served, server.url)


def _run(job: DownloadJob, rows: list[dict[str, Any]], served: str) -> None:
    """Let video2dataset make the shards that are not there yet. Raises RuntimeError if it leaves any undone."""
    raw = job.output / RAW
    samples_per_shard = _prepare(job, rows)
    total = -(-len(rows) // samples_per_shard)
    temporary = job.output / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    pd.DataFrame(rows).to_parquet(temporary / "input.parquet", index=False)
    settings: dict[str, Any] = {
        "table": str(temporary / "input.parquet"),
        "output": str(raw),
        "temporary": str(temporary),
        "served": served,
        "rule": {"frame_px": job.frame_px, "fps": job.fps, "max_frames": job.max_frames},
        "timeout_s": job.timeout_s,
        "samples_per_shard": samples_per_shard,
        "processes": job.processes,
        "threads": job.threads,
    }
    (temporary / "settings.json").write_text(json.dumps(settings))
    command = [str(job.video2dataset_python), "-m", PLUGIN, str(temporary / "settings.json")]
    progress = Progress(job.output, len(rows))
    with (job.output / LOG).open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=_environment(), start_new_session=True)
        try:
            while process.poll() is None:
                progress.update(min(_done(raw) * samples_per_shard, len(rows) - 1), note="videos")
                time.sleep(POLL_S)
        finally:
            _end(process)
    if process.returncode or _done(raw) < total:
        tail = "\n".join((job.output / LOG).read_text(errors="replace").splitlines()[-LOG_LINES:])
        raise RuntimeError(f"video2dataset left {total - _done(raw)} of {total} shards undone; the end of {job.output / LOG}:\n{tail}")
    progress.update(len(rows), note="videos")
    shutil.rmtree(temporary)


def _prepare(job: DownloadJob, rows: list[dict[str, Any]]) -> int:
    """Keep the shards of an earlier attempt at the same download, and nothing else; returns the samples per shard."""
    raw, plan = job.output / RAW, job.output / PLAN
    identity = hash_json([[row | {"url": ""} for row in rows], job.frame_px, job.fps, job.max_frames])
    try:
        earlier = json.loads(plan.read_text())
    except (FileNotFoundError, ValueError):
        earlier = {}
    if earlier.get("identity") != identity:
        shutil.rmtree(raw, ignore_errors=True)
        shards = max(job.processes * SHARDS_PER_PROCESS, -(-len(rows) // LARGEST_SHARD))
        earlier = {"identity": identity, "samples_per_shard": max(2, -(-len(rows) // shards))}  # video2dataset cannot count to 1
        write_atomically(plan, json.dumps(earlier).encode())
    raw.mkdir(exist_ok=True)
    shutil.rmtree(raw / "_tmp", ignore_errors=True)
    for statistics in raw.glob("*_stats.json"):
        try:
            json.loads(statistics.read_text())
        except ValueError:  # cut short when it was written: the shard is not known to be whole
            statistics.unlink()
    return earlier["samples_per_shard"]


def _done(raw: Path) -> int:
    return len(list(raw.glob("*_stats.json")))


def _end(process: subprocess.Popen) -> None:
    """End video2dataset and its children, which are a group of their own."""
    if process.poll() is None:
        os.killpg(process.pid, 9)
        process.wait()


def _write_bad(path: Path, clips: dict[int, BadClip]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["row", "url", "reason"])
        writer.writerows((number + 1, clip.url, clip.reason) for number, clip in clips.items())


def _judge(job: DownloadJob, total: int, bad: list[BadClip]) -> None:
    """Raises UserError if too many failed; what was fetched is then thrown away, so that the next attempt tries them all again."""
    if len(bad) < total and len(bad) <= job.max_bad_share * total:
        return
    shutil.rmtree(job.output / RAW, ignore_errors=True)
    first = "\n    ".join(f"{clip.url}: {clip.reason}" for clip in bad[:SHOWN_BAD])
    what = "none of the videos could be used" if len(bad) == total else f"{len(bad)} of {total} videos failed; {job.max_bad_share:.0%} may"
    raise UserError(f"{what}:\n    {first}", where=str(job.table), fix=f"correct the rows listed in {job.output / BAD}")


if __name__ == "__main__":
    run_job(DownloadJob, download)
