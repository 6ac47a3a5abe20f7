"""Shared by all benchmarks: options, output, timing and memory measurement."""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.live import Live
from rich.table import Table


@dataclass(frozen=True)
class Measurement:
    """One number and its reference."""

    benchmark: str
    metric: str
    value: float
    unit: str
    reference: str = ""
    """What `ratio` is relative to."""
    ratio: float | None = None
    threads: int = field(default_factory=torch.get_num_threads)
    load: float = field(default_factory=lambda: os.getloadavg()[0])
    """The machine's load average at the time of measurement. Well above `threads` means noisy timings."""


def arguments(doc: str, **options: dict[str, Any]) -> argparse.Namespace:
    """Parse `--json`, `--threads` and a benchmark's own options."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads")
    for name, option in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **option)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    return parsed


def show(measurements: Iterable[Measurement], *, as_json: bool) -> None:
    """Print measurements as they arrive, as JSON lines or as a growing table."""
    if as_json:
        for measurement in measurements:
            print(json.dumps(asdict(measurement)), flush=True)
        return
    table = Table("metric", "value", "unit", "ratio", "against", "threads", "load")
    with Live(table):
        for m in measurements:
            ratio = "" if m.ratio is None else f"{m.ratio:.3f}"
            table.add_row(m.metric, f"{m.value:,.3f}", m.unit, ratio, m.reference, str(m.threads), f"{m.load:.1f}")


def side_by_side(functions: Mapping[str, Callable[[], Any]], *, rounds: int = 5) -> dict[str, float]:
    """Return the median seconds of each function after one warm-up.

    Functions run in turn, so that drift of the machine affects all alike, and every second round backwards, so that none always follows
    the same one.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        for name, function in reversed(list(functions.items())) if number % 2 else functions.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in times.items()}


def peak_memory_gb(function: Callable[[], Any]) -> float:
    """Return the peak resident memory of `function()` above the memory before it, in GB (1e9 bytes). Linux only."""
    gc.collect()
    before = _status_kb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    function()
    return (_status_kb("VmHWM") - before) * 1024 / 1e9


def resident_gb() -> float:
    """Return the resident memory of this process in GB (1e9 bytes)."""
    return _status_kb("VmRSS") * 1024 / 1e9


def _status_kb(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise KeyError(key)
