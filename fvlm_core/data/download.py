"""Fetches the videos of a recorded source through video2dataset (`fetch`) and keeps their frames.

Videos that fail are listed with their reasons, and tolerated up to a share. Above it the job refuses, but keeps what it has: after a
correction the same folder goes on.
"""

import csv
import re
import subprocess
import time
from collections import Counter
from pathlib import Path

import pandas as pd

from fvlm_core.cli import run_job
from fvlm_core.data.fetch import PLUGIN, RAW, environment, fetch
from fvlm_core.data.jobs import BadClip, DownloadJob, DownloadManifest
from fvlm_core.data.raw_shards import read_samples
from fvlm_core.data.sources.record import FILE, FILE_ROW, Record, incomplete, read_rows, record, record_folder
from fvlm_core.errors import UserError
from fvlm_core.manifest import file_entries

CONTENT, BAD = "content.parquet", "bad.csv"
SHOWN_REASONS = 8
"""Reasons named in an error, the most frequent first; `bad.csv` has every video's own."""
CHECK = f"import av, {PLUGIN}; assert 'h264' in av.codecs_available, 'PyAV cannot decode H.264'"


def download(job: DownloadJob) -> DownloadManifest:
    """Fetch everything. Raises UserError for a bad source, a missing environment, or too many videos that fail."""
    started = time.monotonic()
    _check_environment(job)
    known, folder = _recorded(job)
    job.output.mkdir(parents=True, exist_ok=True)
    bad = incomplete(folder)
    wanted = [row for row in range(known.rows) if row not in bad]
    bad |= fetch(job, known, folder, wanted, enough=lambda failed: _acceptable(job, len(bad) + failed, known.rows))
    clips = _write_bad(job.output / BAD, folder, bad)
    if not _acceptable(job, len(bad), known.rows):
        raise _too_many(job, clips, known.rows)
    samples = read_samples(job.output / RAW)
    columns = ("row", "origin", "source", "kind", "split", "num_frames", "duration_s")
    content = [{name: sample.record[name] for name in columns} | {"sha256": sample.identity()} for sample in samples]
    pd.DataFrame(content).to_parquet(job.output / CONTENT, index=False)
    return DownloadManifest(
        name="download",
        settings_hash=job.hash(exclude={"output", "record", "source"}),
        inputs={"record": known.digest},
        counts={
            "videos": known.rows,
            "good": len(samples),
            "bad": len(clips),
            "frames": sum(sample.record["num_frames"] for sample in samples),
        },
        files=file_entries(job.output, [CONTENT]) + file_entries(job.output, [f"{RAW}/*/*.tar", BAD], identity=False),
        frame_px=job.frame_px,
        fps=job.fps,
        bad=clips,
        seconds=time.monotonic() - started,
    ).write(job.output)


def _recorded(job: DownloadJob) -> tuple[Record, Path]:
    """The record that the job names, or that of the source it names, and its folder. Raises UserError."""
    if job.record is not None:
        return Record.read_folder(job.record), job.record
    assert job.source is not None
    return record(job.source, job.output), record_folder(job.source, job.output)


def _check_environment(job: DownloadJob) -> None:
    fix = "run ./infra/video2dataset_env.sh"
    try:
        result = subprocess.run([job.video2dataset_python, "-c", CHECK], capture_output=True, text=True, env=environment(), check=False)
    except OSError as error:
        raise UserError("video2dataset's environment is missing", where=str(job.video2dataset_python), fix=fix) from error
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(f"video2dataset's environment does not work: {reason[0]}", where=str(job.video2dataset_python), fix=fix)


def _write_bad(path: Path, folder: Path, bad: dict[int, str]) -> list[BadClip]:
    """Write and return the videos that failed, with their place in the source's files."""
    clips: list[BadClip] = []
    first = 0
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "row", "url", "reason"])
        for batch in read_rows(folder, ["url", FILE, FILE_ROW]) if bad else ():
            rows = [row for row in range(batch.num_rows) if first + row in bad]
            chosen = batch.take(rows).to_pydict()
            for row, url, file, number in zip(rows, chosen["url"], chosen[FILE], chosen[FILE_ROW], strict=True):
                writer.writerow([file, number, url, bad[first + row]])
                clips.append(BadClip(url=url, reason=bad[first + row]))
            first += batch.num_rows
    return clips


def _acceptable(job: DownloadJob, bad: int, total: int) -> bool:
    return bad < total and bad <= job.max_bad_share * total


def _too_many(job: DownloadJob, bad: list[BadClip], total: int) -> UserError:
    """The refusal, with the reasons by how often there are."""
    examples: dict[str, BadClip] = {}
    counts = Counter[str]()
    for clip in bad:
        kind = _kind(clip.reason)
        counts[kind] += 1
        examples.setdefault(kind, clip)
    lines = [f"{number} x {kind}, e.g. {examples[kind].url or '(no url)'}" for kind, number in counts.most_common(SHOWN_REASONS)]
    if (more := len(counts) - SHOWN_REASONS) > 0:
        lines.append(f"and {more} more reasons")
    what = "none of the videos could be used" if len(bad) == total else f"{len(bad)} of {total} videos failed; {job.max_bad_share:.0%} may"
    listed = "\n    ".join(lines)
    return UserError(
        f"{what}:\n    {listed}",
        where=str(job.output / BAD),
        fix="correct the rows listed there, or raise max_bad_share; run again to try those that failed once more. What was fetched is kept",
    )


def _kind(reason: str) -> str:
    """The reason without what is of one video only."""
    return re.split(r"[:(;]| at \d", reason)[0].strip()


if __name__ == "__main__":
    run_job(DownloadJob, download)
