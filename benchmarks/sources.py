"""The cost of recording a source with a million rows, and of checking its record later: `python -m benchmarks.sources`.

The sources are URLs in csv and in parquet, chats about videos in json (LLaVA's format), and a csv that names the files of a tar.
"""

import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from benchmarks.report import Measurement, arguments, peak_memory_gb, show
from fvlm_core.data.jobs import Source
from fvlm_core.data.sources.record import cached_record, make_record

WORDS = ("a", "dog", "runs", "over", "the", "wet", "grass", "while", "two", "children", "watch", "it", "from", "an", "old", "bench")
CAPTION_WORDS = 24
BATCH_ROWS = 100_000


def main() -> None:
    """Measure and print the results."""
    asked = arguments(__doc__ or "", rows={"type": int, "default": 1_000_000})
    with tempfile.TemporaryDirectory() as folder:
        show(measure(Path(folder), asked.rows), as_json=asked.json)


def measure(folder: Path, rows: int) -> Iterator[Measurement]:
    """Measure seconds and memory of the first read of each source, and of a later one."""
    for kind, settings in sources(folder, rows):
        source = Source.model_validate({"name": kind} | settings)
        megabytes = sum(path.stat().st_size for path in [*source.files, *source.archives]) / 1e6
        about = f"{rows:,} rows, {megabytes:,.0f} MB"
        for metric, look in (("record", make_record), ("later look", cached_record)):
            seconds, cpu_s, peak_gb = cost(lambda look=look, source=source: look(source, folder))
            yield Measurement("sources", f"{metric}, {kind}", seconds, "s", about)
            yield Measurement("sources", f"{metric}, {kind}: CPU", cpu_s, "s", about)
            yield Measurement("sources", f"{metric}, {kind}: peak memory", peak_gb, "GB", about)


def sources(folder: Path, rows: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and settings of each source; its files are written on demand."""
    for suffix in ("csv", "parquet"):
        yield suffix, {"files": [write(folder / f"videos.{suffix}", rows)]}
    yield "json", {"format": "llava_video", "files": [write_json(folder / "chats.json", rows)]}
    table, archive = write_archive(folder / "clips.csv", folder / "clips.tar", rows)
    yield "archive", {"format": "openvid", "files": [table], "archives": [archive]}


def cost(function: Callable[[], Any]) -> tuple[float, float, float]:
    """Return seconds, CPU seconds, and peak memory in GB above the initial memory."""
    taken: list[float] = []

    def timed() -> None:
        started, cpu = time.perf_counter(), time.process_time()
        function()
        taken.extend([time.perf_counter() - started, time.process_time() - cpu])

    peak_gb = peak_memory_gb(timed)
    return taken[0], taken[1], peak_gb


def write(path: Path, rows: int) -> Path:
    """Write a table of URLs with captions of 24 words."""
    rng = np.random.default_rng(0)
    schema = pa.schema([("url", pa.string()), ("caption", pa.string())])
    writer = pacsv.CSVWriter(path, schema) if path.suffix == ".csv" else pq.ParquetWriter(path, schema)
    with writer:
        for first in range(0, rows, BATCH_ROWS):
            number = min(BATCH_ROWS, rows - first)
            words = np.array(WORDS)[rng.integers(len(WORDS), size=(number, CAPTION_WORDS))]
            urls = [f"https://videos.example.org/{row // 1000:05d}/{row:08d}.mp4" for row in range(first, first + number)]
            writer.write_table(pa.table([urls, [" ".join(line) for line in words]], schema=schema))
    return path


def write_json(path: Path, rows: int) -> Path:
    """Write a list of records in LLaVA's format, with answers of 24 words."""
    rng = np.random.default_rng(0)
    with path.open("w") as stream:
        for number in range(rows):
            answer = " ".join(WORDS[word] for word in rng.integers(len(WORDS), size=CAPTION_WORDS))
            said = [{"from": "human", "value": "<image>\nWhat happens?"}, {"from": "gpt", "value": answer}]
            record = {"id": number, "conversations": said, "data_source": "x", "video": f"{number // 1000:05d}/{number:08d}.mp4"}
            stream.write(("[" if number == 0 else ",\n") + json.dumps(record))
        stream.write("]")
    return path


def write_archive(table: Path, archive: Path, rows: int) -> tuple[Path, Path]:
    """Write a csv in OpenVid's format, and a tar of the empty files that it names."""
    with table.open("w") as stream, tarfile.open(archive, "w") as made:
        stream.write("video,caption\n")
        for number in range(rows):
            stream.write(f"{number:08d}.mp4,{' '.join(WORDS)}\n")
            made.addfile(tarfile.TarInfo(f"videos/{number:08d}.mp4"))
            made.members = []  # ty: ignore[missing-attribute] -- tarfile would keep them all
    return table, archive


if __name__ == "__main__":
    main()
