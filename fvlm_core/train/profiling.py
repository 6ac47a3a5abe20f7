"""Profile some training steps of a run: a trace, and a table of operations by time."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fvlm_core.config import ProfileSettings
from fvlm_core.manifest import write_atomically

FOLDER, TRACE_FILE, TABLE_FILE = "profile", "trace.json", "table.txt"
TABLE_ROWS = 40


class Profiler:
    """Profiles the steps given by the settings. Does nothing without settings."""

    def __init__(self, settings: ProfileSettings | None, output: Path, device: torch.device) -> None:
        """Results are written to `output/profile` after the last profiled step."""
        self.folder, self.sort_by = output / FOLDER, "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        self.profile = None
        self.settings, self.written = settings, False
        if settings is not None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
            # the profiler uses the step before the first profiled one to warm up
            warm_up = min(1, settings.after)
            plan = schedule(wait=settings.after - warm_up, warmup=warm_up, active=settings.steps, repeat=1)
            self.profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write)

    def __enter__(self) -> "Profiler":
        if self.profile is not None:
            self.profile.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self.profile is not None:
            self.profile.stop()

    def step(self) -> None:
        """Call after every training step."""
        if self.profile is not None:
            self.profile.step()

    @property
    def missing(self) -> str | None:
        """After the run: the reason why no step was profiled; None if steps were profiled or none were requested."""
        if self.settings is None or self.written:
            return None
        return f"no step was profiled: this process ran no more than {self.settings.after} steps; lower run.profile.after"

    def _write(self, profiled: profile) -> None:
        self.written = True
        self.folder.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(self.folder / TRACE_FILE))
        table = profiled.key_averages().table(sort_by=self.sort_by, row_limit=TABLE_ROWS)
        write_atomically(self.folder / TABLE_FILE, (str(table) + "\n").encode())
