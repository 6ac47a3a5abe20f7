"""Downloads the videos of a recorded source, or of a part of it, with video2dataset (`fetch`), and keeps their frames.

Failed videos are listed with their reasons, and tolerated up to a share. Above it, the job fails but keeps what it has fetched: once the
cause is corrected, it resumes in the same folder.
"""

import csv
import subprocess
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from fvlm_core.cli import run_job
from fvlm_core.data.fetch import PLUGIN, environment, fetch
from fvlm_core.data.jobs import BadClip, DownloadJob, DownloadManifest
from fvlm_core.data.parts import Part, incomplete, read_part
from fvlm_core.data.raw_shards import CONTENT, PLACES, RAW, write_contents
from fvlm_core.data.rejected import kind_of
from fvlm_core.data.sources.record import FILE, FILE_ROW, Record, make_record, record_folder
from fvlm_core.errors import UserError
from fvlm_core.manifest import file_entries

BAD = "bad.csv"
SHOWN_REASONS = 8
"""Reasons listed in an error, most frequent first; `bad.csv` lists every video."""
CHECK = f"import av, {PLUGIN}; assert 'h264' in av.codecs_available, 'PyAV cannot decode H.264'"


def download(job: DownloadJob) -> DownloadManifest:
    """Download everything. Raises UserError for a bad source, a missing environment, or too many failed videos."""
    started = time.monotonic()
    _check_environment(job.video2dataset_python)
    known, folder = _recorded(job)
    part = Part.of(folder, job.first, min(known.rows - job.first, job.rows or known.rows))
    job.output.mkdir(parents=True, exist_ok=True)
    bad = incomplete(folder, part)
    wanted = [row for row in part.numbers if row not in bad]
    bad |= fetch(job, part, folder, wanted, enough=lambda failed: _acceptable(job, len(bad) + failed, part.rows))
    clips = _write_bad(job.output / BAD, folder, part, bad)
    if not _acceptable(job, len(bad), part.rows):
        raise _too_many(job, clips, part.rows)
    good, frames = write_contents(job.output)
    return DownloadManifest(
        name="download",
        settings_hash=job.hash(exclude={"output", "record", "source"}),
        inputs={"record": part.digest},
        counts={"videos": part.rows, "good": good, "bad": len(clips), "frames": frames},
        files=file_entries(job.output, [CONTENT]) + file_entries(job.output, [f"{RAW}/*/*.tar", PLACES, BAD], identity=False),
        frame_px=job.frame_px,
        fps=job.fps,
        max_frames=job.max_frames,
        bad=clips,
        seconds=time.monotonic() - started,
    ).write(job.output)


def _recorded(job: DownloadJob) -> tuple[Record, Path]:
    """Return the record of the job, made first if the job gives a source, and its folder. Raises UserError."""
    if job.record is not None:
        return Record.read_folder(job.record), job.record
    assert job.source is not None
    return make_record(job.source, job.output), record_folder(job.source, job.output)


@lru_cache  # one check per process is enough; failures are not cached
def _check_environment(python: Path) -> None:
    fix = "run ./infra/video2dataset_env.sh"
    try:
        result = subprocess.run([python, "-c", CHECK], capture_output=True, text=True, env=environment(), check=False)
    except OSError as error:
        raise UserError("video2dataset's environment is missing", where=str(python), fix=fix) from error
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(f"video2dataset's environment does not work: {reason[0]}", where=str(python), fix=fix)


def _write_bad(path: Path, folder: Path, part: Part, bad: dict[int, str]) -> list[BadClip]:
    """Write and return the failed videos, with their location in the source's files."""
    clips: list[BadClip] = []
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "row", "url", "reason"])
        for first, batch in read_part(folder, part, ["url", "source", FILE, FILE_ROW]) if bad else ():
            rows = [row for row in range(batch.num_rows) if first + row in bad]
            for row, chosen in zip(rows, batch.take(pa.array(rows, pa.int64())).to_pylist(), strict=True):
                reason = bad[first + row]
                writer.writerow([chosen[FILE], chosen[FILE_ROW], chosen["url"], reason])
                clips.append(BadClip(url=chosen["url"], reason=reason, source=chosen["source"]))
    return clips


def _acceptable(job: DownloadJob, bad: int, total: int) -> bool:
    return bad < total and bad <= job.max_bad_share * total


def _too_many(job: DownloadJob, bad: list[BadClip], total: int) -> UserError:
    """Return the error, with the reasons sorted by frequency."""
    examples: dict[str, BadClip] = {}
    counts = Counter[str]()
    for clip in bad:
        kind = kind_of(clip.reason)
        counts[kind] += 1
        examples.setdefault(kind, clip)
    lines = [f"{number} x {kind}, e.g. {examples[kind].url or '(no url)'}" for kind, number in counts.most_common(SHOWN_REASONS)]
    if (more := len(counts) - SHOWN_REASONS) > 0:
        lines.append(f"and {more} more reasons")
    what = (
        "none of the videos could be used"
        if len(bad) == total
        else f"{len(bad)} of {total} videos failed; at most {job.max_bad_share:.0%} may"
    )
    listed = "\n    ".join(lines)
    return UserError(
        f"{what}:\n    {listed}",
        where=str(job.output / BAD),
        fix="correct the rows listed there, or raise max_bad_share (in a profile precompute.download.max_bad_share); run again to retry "
        "the failed videos. Fetched videos are kept",
    )


if __name__ == "__main__":
    run_job(DownloadJob, download)
