"""Show a pipeline run in the terminal: a line per phase with its running steps below; plain lines without a terminal."""

import time
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from flows.registry import PHASES
from fvlm_core.progress import ProgressReport
from tasks.status import PhaseStatus

COLOURS = {"Running": "cyan", "Completed": "green", "Cached": "green", "Failed": "red", "Crashed": "red", "Cancelled": "yellow"}
WAITING = "waiting"
PLAIN_INTERVAL_S = 15.0
"""Interval between lines about a running phase, without a terminal."""


@dataclass
class PhaseView:
    """The state of a phase, as displayed."""

    state: str = WAITING
    status: PhaseStatus | None = None
    started: float | None = None
    ended: float | None = None

    def seconds(self) -> float | None:
        """Time that the phase has run, in seconds."""
        return None if self.started is None else (self.ended or time.monotonic()) - self.started


@dataclass
class Display:
    """A live display. Use it as a context manager around the run, and call `show` with every update."""

    console: Console
    phases: dict[str, PhaseView] = field(default_factory=lambda: {name: PhaseView() for name in PHASES})

    def __enter__(self) -> Self:
        self.live = Live(console=self.console, refresh_per_second=4, get_renderable=self._table) if self.console.is_terminal else None
        self.printed = time.monotonic()
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self.live:
            self.live.stop()

    def show(self, phase: str, state: str, status: PhaseStatus | None) -> None:
        """Update a phase's state and status."""
        view = self.phases[phase]
        running, was_running = state == "Running", view.state == "Running"
        if running and not was_running:
            view.started, view.ended = time.monotonic(), None
        if was_running and not running:
            view.ended = time.monotonic()
        changed, view.state, view.status = state != view.state, state, status if running else None
        due = running and time.monotonic() - self.printed > PLAIN_INTERVAL_S
        if self.live is None and (changed or due):
            self.printed = time.monotonic()
            seconds = view.seconds()
            took = f" ({seconds:.0f} s)" if seconds is not None and not running else ""
            self.console.print(
                f"{phase:<12} {state}{took}{f'  {status.text()}' if running and status else ''}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def _table(self) -> RenderableType:
        table = Table("phase", "state", "step", "loss", "time", "left", box=None, pad_edge=False, header_style="bold")
        for name, view in self.phases.items():
            seconds = view.seconds()
            done = f"{view.status.done} of {view.status.total} steps" if view.status else ""
            table.add_row(name, f"[{COLOURS.get(view.state, 'dim')}]{view.state}[/]", done, "", _duration(seconds), "")
            for step, report in (view.status.running if view.status else {}).items():
                table.add_row(f"  {step}", "", *_cells(report))
        return table


def _cells(report: ProgressReport | None) -> tuple[str, str, str, str]:
    """Cells of a running step: step, loss, time, time left."""
    if report is None:
        return "starting", "", "", ""
    step = f"{report.step}/{report.total} {report.note}".strip()
    loss = "" if report.loss is None else f"{report.loss:.3f}"
    return escape(step), loss, _duration(report.elapsed_s), _duration(report.remaining_s)


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
