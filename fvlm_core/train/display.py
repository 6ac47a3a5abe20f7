"""Console output of a run: plain lines and, on a terminal, a progress bar with step, loss, learning rate and remaining time."""

import sys
from types import TracebackType
from typing import Any, Self


class Display:
    """Console output of one process. Use as a context manager around the run."""

    def __init__(self, name: str, total: int, *, enabled: bool, live: bool) -> None:
        """`enabled`: print at all (on one rank only). `live`: show a progress bar if the output is a terminal."""
        self.name, self.total, self.enabled = name, total, enabled
        self.live: Any = None
        if enabled and live and sys.stdout.isatty():
            self.live = _live()
            self.task = self.live.add_task(name, total=total, loss="", lr="")

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False)
        elif self.enabled:
            print(text, flush=True)

    def update(self, step: int, *, loss: float, lr: float) -> None:
        """Show that `step` is done. It may be lower than the previous one, after a rollback."""
        if self.live is not None:
            self.live.update(self.task, completed=step, loss=f"loss {loss:.4f}", lr=f"lr {lr:.2e}")


def _live() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # only terminals need it

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[lr]}"),
        TimeRemainingColumn(),
    )
