"""What it costs to record a source of a million rows, and to look at its record later: `python -m benchmarks.sources`."""

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
from fvlm_core.data.sources.record import record, recorded

WORDS = ("a", "dog", "runs", "over", "the", "wet", "grass", "while", "two", "children", "watch", "it", "from", "an", "old", "bench")
CAPTION_WORDS = 24
BATCH_ROWS = 100_000


def main() -> None:
    """Measure and print."""
    asked = arguments(__doc__ or "", rows={"type": int, "default": 1_000_000})
    with tempfile.TemporaryDirectory() as folder:
        show(measure(Path(folder), asked.rows), as_json=asked.json)


def measure(folder: Path, rows: int) -> Iterator[Measurement]:
    """Seconds and memory of the first look at a csv and a parquet file of as many web addresses, and of a later look."""
    for suffix in ("csv", "parquet"):
        path = write(folder / f"videos.{suffix}", rows)
        source = Source.model_validate({"name": f"videos_{suffix}", "files": [path]})
        megabytes = path.stat().st_size / 1e6
        about = f"{rows:,} rows, {megabytes:,.0f} MB"
        for metric, look in (("record", record), ("later look", recorded)):
            seconds, cpu_s, peak_gb = cost(lambda look=look, source=source: look(source, folder))
            yield Measurement("sources", f"{metric}, {suffix}", seconds, "s", about)
            yield Measurement("sources", f"{metric}, {suffix}: CPU", cpu_s, "s", about)
            yield Measurement("sources", f"{metric}, {suffix}: peak memory", peak_gb, "GB", about)


def cost(function: Callable[[], Any]) -> tuple[float, float, float]:
    """Seconds, CPU seconds, and peak memory in GB above what was there before."""
    taken: list[float] = []

    def timed() -> None:
        started, cpu = time.perf_counter(), time.process_time()
        function()
        taken.extend([time.perf_counter() - started, time.process_time() - cpu])

    peak_gb = peak_memory_gb(timed)
    return taken[0], taken[1], peak_gb


def write(path: Path, rows: int) -> Path:
    """A table of web addresses with captions of 24 words."""
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


if __name__ == "__main__":
    main()
