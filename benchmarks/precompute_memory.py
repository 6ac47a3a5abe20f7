"""Does precompute need more memory for more samples? `python -m benchmarks.precompute_memory`.

Each size runs in a process of its own, through the code of the real jobs: record the source's table, split it into parts, write what the
download of each part would leave (`content.parquet`, `places.parquet`), plan the shards, and join the index of all shards. Only the frames
are missing; they are written one shard at a time, so their memory does not depend on the number of shards.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fvlm_core.data.arrow import pc
from fvlm_core.data.jobs import INDEX_FILE, Source, SourceCounts
from fvlm_core.data.parts import parts_of, read_part
from fvlm_core.data.raw_shards import CONTENT, CONTENT_SCHEMA, PLACES, PLACES_SCHEMA
from fvlm_core.data.shard_files import INDEX_SCHEMA, Shard, shard_name
from fvlm_core.data.shard_parts import ShardPart, write_index
from fvlm_core.data.shard_plan import Plan
from fvlm_core.data.sources.record import make_record, record_folder

ROWS = (1_000_000, 4_000_000)
PART, SHARD = 20_000, 1000
FRAME_BYTES = 9000
VAL_SHARE = 0.005
CSV_ROWS = 100_000


def main() -> None:
    """Run all sizes and print the results."""
    from benchmarks.report import Measurement, arguments, show  # imports torch, which the measured processes must not load

    asked = arguments(__doc__ or "", rows={"type": int, "nargs": "*", "default": list(ROWS)})

    def measured() -> Iterator[Measurement]:
        peaks: list[float] = []
        for rows in asked.rows:
            command = [sys.executable, "-m", "benchmarks.precompute_memory", f"rows={rows}"]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
            peaks.append(found["peak_gb"])
            yield Measurement("precompute_memory", f"peak_gb_{rows}", peaks[-1], "GB", f"{rows:,} rows", peaks[-1] / peaks[0])
            yield Measurement("precompute_memory", f"cpu_s_{rows}", found["cpu_s"], "s", f"{rows:,} rows")

    show(measured(), as_json=asked.json)


def prepare(folder: Path, rows: int) -> dict[str, Any]:
    """Prepare `rows` rows without their frames; return the process's peak memory and CPU time."""
    source = Source.model_validate({"name": "videos", "files": [table(folder / "videos.csv", rows)]})
    known, at = make_record(source, folder), record_folder(source, folder)
    downloads = []
    for number, part in enumerate(parts_of(at, known, PART)):
        downloads.append(download(at, part, folder / f"download-{number}"))
    with Plan(folder / "plan.sqlite", new=True) as plan:
        for number, made in enumerate(downloads):
            plan.add_download(number, made)
        plan.decide(lambda _source: VAL_SHARE, val_samples=10_000, validation=None)
        write_index(shards(plan, folder), folder / INDEX_FILE)
        plan.write_validation(folder / "validation.csv")
    used = getrusage(RUSAGE_SELF)
    assert pq.read_metadata(folder / INDEX_FILE).num_rows == rows
    return {"peak_gb": used.ru_maxrss * 1024 / 1e9, "cpu_s": used.ru_utime + used.ru_stime}


def table(path: Path, rows: int) -> Path:
    """Write a csv of URLs with one-sentence captions."""
    with path.open("w") as stream:
        stream.write("url,caption\n")
        for first in range(0, rows, CSV_ROWS):
            stream.writelines(
                f"https://videos.example.org/{row // 1000:05d}/{row:08d}.mp4,a dog runs over the wet grass while {row} children watch it "
                "from an old bench near the pond and the sun goes down behind the trees\n"
                for row in range(first, min(first + CSV_ROWS, rows))
            )
    return path


def download(record_at: Path, part: Any, folder: Path) -> Path:
    """Write what the download of a part leaves, except its tars."""
    folder.mkdir()
    contents, places = pq.ParquetWriter(folder / CONTENT, CONTENT_SCHEMA), pq.ParquetWriter(folder / PLACES, PLACES_SCHEMA)
    with contents, places:
        for first, batch in read_part(record_at, part, ["url", "source", "kind", "split"]):
            rows = range(first, first + batch.num_rows)
            hashes = [sha256(str(row).encode()).hexdigest() for row in rows]
            frames = [1 + row * 2654435761 % 64 for row in rows]
            columns = [
                pa.array(rows, pa.int64()),
                *(batch.column(name) for name in ("url", "source", "kind", "split")),
                pa.array(frames, pa.int32()),
                pa.array([float(number) for number in frames], pa.float64()),
                *(pa.array(hashes) for _ in range(3)),
            ]
            contents.write_batch(pa.RecordBatch.from_arrays(columns, schema=CONTENT_SCHEMA))
            offsets = pc.multiply(pa.array(rows, pa.int64()), 64 * FRAME_BYTES)
            where = [
                pa.array([f"raw/0/{row // 1000:05d}.tar" for row in rows]),
                offsets,
                pa.array([n * FRAME_BYTES for n in frames], pa.int64()),
            ]
            places.write_batch(pa.RecordBatch.from_arrays(where, schema=PLACES_SCHEMA))
    return folder


def shards(plan: Plan, folder: Path) -> Iterator[Path]:
    """Write the metadata of each shard, as the processes that write shards do."""
    for source, split, first, samples in plan.groups():
        for number, start in enumerate(range(0, samples, SHARD)):
            name = shard_name(split, source, number)
            chosen = list(plan.read(first + start, min(SHARD, samples - start)))
            rows = [row(name, one, split, source) for one in chosen]
            counts = SourceCounts(name=source, kind="video", split=split, samples=len(rows), conversations=len(rows), frames=0, tokens=0)
            path = folder / "work" / f"{name}.parquet"
            ShardPart.write(Shard(name, rows, [], [], counts), path)
            yield path


def row(name: str, planned: Any, split: str, source: str) -> dict[str, Any]:
    """Return the index row of a sample."""
    frames = planned.place[3] // FRAME_BYTES
    values = dict.fromkeys(INDEX_SCHEMA.names) | {"split": split, "source": source, "shard": name, "key": planned.origin}
    return values | {
        "kind": "video",
        "task": "caption",
        "conversation": 0,
        "json_offset": frames * FRAME_BYTES,
        "json_size": 900,
        "frame_offsets": [number * FRAME_BYTES for number in range(frames)],
        "frame_sizes": [FRAME_BYTES] * frames,
        "n_frames": frames,
        "n_tokens": 60,
        "n_answer_tokens": 30,
        "duration_s": float(frames),
    }


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("rows="):
        with tempfile.TemporaryDirectory() as temporary:
            print(json.dumps(prepare(Path(temporary), int(sys.argv[1].removeprefix("rows=")))))
    else:
        main()
